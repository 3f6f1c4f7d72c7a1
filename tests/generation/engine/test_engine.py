"""Every question gets the answer that it gets alone; what is wrong with one of them stays with it."""

import random
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import florence2
from florence2.errors import OptionError, PromptError
from florence2.generation.budget import generation_bytes
from florence2.generation.engine.engine import Done, Engine, Ticket, Work
from florence2.generation.generate import generate
from florence2.pipeline import Florence2
from parity.schedules import SETTINGS, Question, make_questions, run_schedule
from parity.ties import TokenCount
from tests.release import keep


@pytest.fixture(scope="module")
def f() -> Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="module")
def questions(f: Florence2) -> list[Question]:
    return make_questions(f, random.Random(0), 4 * len(SETTINGS))


@pytest.fixture
def image() -> Tensor:
    return torch.rand(1, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def finish(engine: Engine) -> list[Done]:
    done = []
    while engine.busy:
        done += engine.step()
    return done


def caption(f: Florence2, image: Tensor | None = None, **settings: Any) -> Work:
    return Work(f.processor.prompt("<CAPTION>"), f.options(**settings), pixel_values=image)


@pytest.mark.parametrize("seed", keep([1], range(6)))
def test_random_schedules(f: Florence2, questions: list[Question], seed: int) -> None:
    """`python -m parity` runs many more."""
    count = TokenCount()
    run_schedule(f, questions, random.Random(seed), count)
    assert count.total > 0 and count.equal + count.ties == count.total


def test_every_tensor_is_made_on_the_models_own_device(f: Florence2, image: Tensor) -> None:
    """Whatever torch's own default is: tensors of this one, "meta", have no values."""
    works = [caption(f, image, max_new_tokens=n, num_beams=k) for n, k in ((2, 1), (6, 2), (4, 2))]
    works.append(replace(works[1], prompt=f.processor.prompt("<OD>")))
    expected = [generation.sequences.tolist() for generation in answers(f, works)]
    with torch.device("meta"):
        assert [generation.sequences.tolist() for generation in answers(f, works)] == expected


def answers(f: Florence2, works: list[Work]) -> list[Any]:
    engine = Engine(f.model, 3)
    tickets = [engine.submit(work) for work in works]
    found = {done.ticket: done.generation for done in finish(engine)}
    return [found[ticket] for ticket in tickets]


def test_scores_and_reasons_are_those_of_generate(f: Florence2, image: Tensor) -> None:
    works = [caption(f, image, max_new_tokens=n, num_return_sequences=k) for n, k in ((4, 1), (25, 1), (25, 3))]
    engine = Engine(f.model)
    tickets = [engine.submit(work) for work in works]
    found = {done.ticket: done.generation for done in finish(engine)}
    for ticket, work in zip(tickets, works, strict=True):
        with torch.no_grad():
            memory = f.model.encode(f.model.encode_image(image), torch.tensor([list(work.prompt)]))
        alone, mine = generate(f.model, memory, work.options), found[ticket]
        assert mine is not None and mine.finish_reasons == alone.finish_reasons
        assert torch.equal(mine.sequences, alone.sequences) and torch.equal(mine.lengths, alone.lengths)
        torch.testing.assert_close(mine.token_logprobs, alone.token_logprobs, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.sequence_scores, alone.sequence_scores, atol=1e-4, rtol=1e-4)
        assert not mine.token_logprobs.is_inference()


def test_the_ids_so_far_of_an_answer_without_beams_can_be_read(f: Florence2, image: Tensor) -> None:
    engine = Engine(f.model)
    given = [{"num_beams": 1, "max_new_tokens": n, "min_new_tokens": n - 1} for n in (4, 7)]
    tickets = [engine.submit(caption(f, image, **each)) for each in [*given, {"max_new_tokens": 3}]]
    assert [engine.written(ticket) for ticket in tickets] == [[], [], []]  # they wait
    seen: dict[Any, list[list[int]]] = {ticket: [] for ticket in tickets}
    found: dict[Any, Any] = {}
    while engine.busy:
        found |= {done.ticket: done.generation for done in engine.step()}
        for ticket in tickets:
            seen[ticket].append(engine.written(ticket))
    for ticket, n in zip(tickets[:2], (4, 7), strict=True):
        ids = found[ticket].sequences[0].tolist()
        assert [each for each in seen[ticket] if each] == [ids[: 1 + i] for i in range(1, n)]
        assert engine.written(ticket) == []  # it has ended
    assert not any(seen[tickets[2]])


def test_a_short_answer_leaves_before_a_long_one(f: Florence2, image: Tensor) -> None:
    engine = Engine(f.model, slots=1)
    first, second = (engine.submit(caption(f, image, max_new_tokens=n, min_new_tokens=n - 1)) for n in (9, 3))
    together = Engine(f.model, slots=2)
    long, short = (together.submit(caption(f, image, max_new_tokens=n, min_new_tokens=n - 1)) for n in (9, 3))
    assert [done.ticket for done in finish(engine)] == [first, second]
    assert [done.ticket for done in finish(together)] == [short, long]


def test_an_image_is_encoded_once(f: Florence2, image: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = []
    encode = f.model.encode_image

    def count(pixels: Tensor) -> Tensor:
        encoded.append(1)
        return encode(pixels)

    monkeypatch.setattr(f.model, "encode_image", count)
    engine = Engine(f.model)
    for pixels in (image, image.clone(), image + 0.1):
        engine.submit(caption(f, pixels, max_new_tokens=3))
    finish(engine)
    engine.submit(caption(f, image, max_new_tokens=3))
    finish(engine)
    assert len(encoded) == 2
    engine = Engine(f.model, cache_bytes=0)
    for _ in range(2):
        engine.submit(caption(f, image, max_new_tokens=3))
    finish(engine)
    assert len(encoded) == 4


def test_cancelled_questions_leave_at_the_next_step(f: Florence2, image: Tensor) -> None:
    engine = Engine(f.model, slots=2)
    tickets = [engine.submit(caption(f, image, max_new_tokens=20, min_new_tokens=19)) for _ in range(4)]
    engine.step()
    engine.cancel(tickets[0])  # runs
    engine.cancel(tickets[3])  # waits
    assert [done.ticket for done in finish(engine)] == tickets[1:3]


def test_what_does_not_fit_waits(f: Florence2, image: Tensor) -> None:
    work = caption(f, image, max_new_tokens=6, min_new_tokens=5)
    length = f.model.config.vision.image_tokens(96, 96) + len(work.prompt)
    each = generation_bytes(f.model.config, work.options, length, f.model.dtype)
    engine = Engine(f.model, slots=8, memory_bytes=int(2.5 * each))
    tickets = [engine.submit(work) for _ in range(4)]
    steps = [[done.ticket for done in engine.step()] for _ in range(12)]
    assert [done for done in steps if done] == [tickets[:2], tickets[2:]] and not engine.busy
    with pytest.raises(OptionError, match=r"One answer may take .* GB, more than the .* GB of this engine"):
        Engine(f.model, memory_bytes=each - 1).submit(work)


@dataclass(frozen=True)
class Nothing:
    """Leaves no id possible once `at` ids are generated."""

    at: int
    name: str = "nothing"

    def applies(self, generated: int) -> bool:
        return generated == self.at

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
        return torch.full_like(scores, float("-inf"))


def test_an_error_stays_with_its_question(f: Florence2, image: Tensor) -> None:
    """Two answers of one group: the rule ends the one that is further, then the other."""
    engine = Engine(f.model)
    good = engine.submit(caption(f, image, max_new_tokens=8, min_new_tokens=7))
    rule = caption(f, image, max_new_tokens=8, min_new_tokens=7, extra_rules=(Nothing(4),))
    first = engine.submit(rule)
    engine.step()
    second = engine.submit(rule)
    nan = torch.full((1, 5, f.model.config.text.d_model), float("nan"))
    wrong = replace(caption(f), features=nan)
    not_finite = engine.submit(wrong)
    done = {each.ticket: each for each in finish(engine)}
    assert "no possible id at position 5" in str(done[first].error)
    assert "no possible id at position 5" in str(done[second].error)
    assert "not finite" in str(done[not_finite].error)
    assert done[good].error is None and done[good].generation is not None


def test_what_is_refused_before_anything_is_computed(f: Florence2, image: Tensor) -> None:
    engine = Engine(f.model)
    text = f.model.config.text
    with pytest.raises(PromptError, match=f"more than the {text.max_position_embeddings} of this checkpoint"):
        engine.submit(replace(caption(f, image), prompt=[5] * text.max_position_embeddings))
    with pytest.raises(OptionError, match="outside this model's vocabulary"):
        engine.submit(caption(f, image, forced_bos_token_id=text.vocab_size))
    with pytest.raises(PromptError, match="neither"):
        engine.submit(caption(f))
    assert not engine.busy


@pytest.mark.parametrize("slots", [0, -1, 1.5, True, "8"])
def test_wrong_numbers_of_slots(f: Florence2, slots: Any) -> None:
    with pytest.raises(OptionError, match="slots is"):
        Engine(f.model, slots)


@pytest.mark.parametrize("share", [-0.1, 1, 2.0])
def test_wrong_shares(f: Florence2, share: float) -> None:
    with pytest.raises(OptionError, match="decoding_share is"):
        Engine(f.model, decoding_share=share)


def test_encoding_does_not_starve_decoding(f: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an image took 10 s, the running answer gets 10 s of steps, 1 s each, before the next image."""
    clock, events = [0.0], []
    monkeypatch.setattr("florence2.generation.engine.engine.time", SimpleNamespace(perf_counter=lambda: clock[0]))
    encode, step = f.model.encode_image, f.model.step

    def slow_encode(pixels: Tensor) -> Tensor:
        clock[0] += 10
        events.append("image")
        return encode(pixels)

    def slow_step(*arguments: Any) -> Tensor:
        clock[0] += 1
        events.append("step")
        return step(*arguments)

    monkeypatch.setattr(f.model, "encode_image", slow_encode)
    monkeypatch.setattr(f.model, "step", slow_step)
    engine = Engine(f.model, decoding_share=0.5)
    for i in range(3):
        engine.submit(caption(f, torch.full((1, 3, 96, 96), i / 4), max_new_tokens=40, min_new_tokens=39))
    for _ in range(25):
        engine.step()
    assert "".join(event[0] for event in events) == "i" + "s" * 10 + "i" + "s" * 10 + "i" + "s" * 5


def test_tickets_are_told_apart(f: Florence2, image: Tensor) -> None:
    engine, work = Engine(f.model), caption(f, image, max_new_tokens=3)
    tickets: list[Ticket] = [engine.submit(work) for _ in range(3)]
    assert len({done.ticket for done in finish(engine)} & set(tickets)) == 3


def test_steps_are_prepared_for_rounded_numbers_of_rows_and_again_after_a_pause(
    f: Florence2, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    monkeypatch.setattr(f.model, "prepare_steps", lambda _, rows: prepared.append(rows))
    engine = Engine(f.model)
    for count in (1, 5, 1):
        for _ in range(count):
            engine.submit(caption(f, image, max_new_tokens=3, min_new_tokens=2))
        finish(engine)
    assert prepared == [4, 16, 4]


@pytest.mark.parametrize("settings", keep([0], [{"num_beams": 3}, {"num_beams": 1}, {"sample": True, "seed": 3}]))
def test_answers_longer_than_the_first_room_of_a_search(f: Florence2, image: Tensor, settings: dict[str, Any]) -> None:
    """A later answer of the same options joins when the first has more room already."""
    work = caption(f, image, max_new_tokens=140, min_new_tokens=135, no_repeat_ngram_size=3, **settings)
    engine = Engine(f.model)
    tickets = [engine.submit(work)]
    for _ in range(70):
        engine.step()
    tickets.append(engine.submit(work))
    found = {done.ticket: done.generation for done in finish(engine)}
    with torch.no_grad():
        memory = f.model.encode(f.model.encode_image(image), torch.tensor([list(work.prompt)]))
    alone = generate(f.model, memory, work.options)
    assert alone.sequences.shape[1] > 135
    for ticket in tickets:
        generation = found[ticket]
        assert generation is not None and torch.equal(generation.sequences, alone.sequences)
        torch.testing.assert_close(generation.token_logprobs, alone.token_logprobs, atol=1e-4, rtol=1e-4)
