"""The engine over recorded steps: what joins, leaves, is cancelled or fails, and what is recorded meanwhile."""

import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import florence2
from florence2.fast.cuda.recorded import slots
from florence2.fast.cuda.recorded.graphs import record_with
from florence2.fast.cuda.recorded.lane import RecordedLane, open_lane
from florence2.fast.cuda.recorded.slots import Bucket, planned_bytes
from florence2.generation.budget import answer_bytes, generation_bytes
from florence2.generation.engine.engine import Done, Engine, Work
from florence2.generation.engine.lane import Lane, OwnLane
from florence2.generation.generate import generate, special_ids
from florence2.generation.options import GenerationOptions
from florence2.pipeline import Florence2
from parity.recipe import make_picture
from parity.schedules import SETTINGS, Question, make_questions, run_schedule
from parity.schedules import answer_alone as answer_as_now
from parity.tape import TapeRecorder
from parity.ties import TokenCount


@pytest.fixture(scope="module")
def f() -> Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="module")
def questions(f: Florence2) -> list[Question]:
    return make_questions(f, random.Random(0), 4 * len(SETTINGS))


@pytest.fixture
def recorder() -> Iterator[TapeRecorder]:
    recorder = TapeRecorder()
    with record_with(recorder):
        yield recorder


def answer_alone(f: Florence2, asked: Work) -> list[list[int]]:
    """The rows of ids that the plain way gives."""
    with record_with(None):
        return answer_as_now(f, asked)


def finish(engine: Engine) -> list[Done]:
    done = []
    while engine.busy:
        done += engine.step()
    return done


def work(f: Florence2, length: int, number: int = 0, **settings: Any) -> Work:
    """A question of `length` ids about synthetic features."""
    generator = torch.Generator().manual_seed(1000 * length + number)
    prompt = torch.randint(4, 600, (length,), generator=generator).tolist()
    features = torch.randn(1, 37, f.model.config.text.d_model, generator=generator)
    return Work(prompt, f.options(**settings), features=features)


@pytest.mark.release
@pytest.mark.parametrize("seed", range(4))
def test_random_schedules(
    f: Florence2, questions: list[Question], seed: int, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`python -m parity` runs many more."""
    monkeypatch.setattr(slots, "WINDOWS", (8, 16, 32, 64))
    monkeypatch.setattr(slots, "MEMORY_STEP", 16)
    count = TokenCount()
    run_schedule(f, questions, random.Random(seed), count)
    assert count.total > 0 and count.equal + count.ties == count.total
    assert recorder.replayed > 0


@pytest.mark.release
def test_no_prompt_length_records_again(f: Florence2, recorder: TapeRecorder) -> None:
    engine = Engine(f.model)
    settings = {"max_new_tokens": 3, "min_new_tokens": 2, "num_beams": 2}
    for length in (1, 100, 200) * 3:
        engine.submit(work(f, length, **settings))
        finish(engine)
    recorded = recorder.recorded
    lengths = list(range(1, 201, 4))  # `python -m parity` tries all
    random.Random(0).shuffle(lengths)
    for length in lengths:
        asked = work(f, length, 1, **settings)
        engine.submit(asked)
        done = finish(engine)[0]
        assert done.generation is not None
        if length % 40 == 1:
            assert done.generation.sequences.tolist() == answer_alone(f, asked)
    assert recorder.recorded == recorded


@pytest.mark.release
def test_mixed_lengths_together_are_answered_from_few_recordings(f: Florence2, recorder: TapeRecorder) -> None:
    """The same schedule, with other prompts each time: only buckets that did not occur are recorded."""
    settings, counts = {"max_new_tokens": 12, "min_new_tokens": 11}, []
    for seed in range(4):
        engine, lengths = Engine(f.model, slots=4), list(range(5, 60, 5))
        random.Random(seed).shuffle(lengths)
        for length in lengths:
            engine.submit(work(f, length, seed, **settings))
        assert len(finish(engine)) == len(lengths)
        counts.append(recorder.recorded)
    assert counts[-1] == counts[-2]


def test_prompts_of_mixed_lengths_are_encoded_together(
    f: Florence2, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each joins by itself where the lane turns out to be the plain one, for a hook came in meanwhile."""
    encode: Any = f.model.encode
    layer = f.model.language_model.decoder.layers[0]
    encoded: list[int] = []
    handles: list[Any] = []

    def count(features: Tensor, *more: Any) -> Tensor:
        encoded.append(len(features))
        if len(encoded) == 2:
            handles.append(layer.register_forward_hook(lambda *_: None))
        memory: Tensor = encode(features, *more)
        return memory

    works = [work(f, length, max_new_tokens=6) for length in (3, 40, 11, 3, 70)]
    expected = [answer_alone(f, each) for each in works]
    monkeypatch.setattr(f.model, "encode", count)
    try:
        for kind in ("RecordedLane", "Lane"):
            engine = Engine(f.model)
            tickets = [engine.submit(each) for each in works]
            found = {done.ticket: done.generation for done in engine.step()}
            assert [type(each).__name__ for each in engine._lanes.values() if len(each)] == [kind]
            found |= {done.ticket: done.generation for done in finish(engine)}
            for ticket, ids in zip(tickets, expected, strict=True):
                generation = found[ticket]
                assert generation is not None and generation.sequences.tolist() == ids
        assert encoded == [5, 5]
    finally:
        handles[0].remove()


def test_options_have_lanes_of_their_own(f: Florence2, recorder: TapeRecorder) -> None:
    """Samples and rules of one's own take the plain lane meanwhile."""
    engine = Engine(f.model)
    works = [
        work(f, 9, i, max_new_tokens=8, **settings)
        for i, settings in enumerate(
            [{}, {"num_beams": 1}, {"sample": True, "seed": 1}, {"length_penalty": 2.0}, {"num_beams": 2}, {}]
        )
    ]
    tickets = [engine.submit(each) for each in works]
    engine.step()
    kinds = [type(each) for each in engine._lanes.values()]
    assert sorted(kind.__name__ for kind in kinds) == ["Lane"] + ["RecordedLane"] * 4
    found = {done.ticket: done.generation for done in finish(engine)}
    for ticket, asked in zip(tickets, works, strict=True):
        generation = found[ticket]
        assert generation is not None and generation.sequences.tolist() == answer_alone(f, asked)
        assert not generation.sequences.is_inference()


def test_a_changed_model_answers_plainly(f: Florence2, recorder: TapeRecorder) -> None:
    """A hook between two steps: what runs and what joins feel it at once."""
    engine, calls = Engine(f.model), []
    for _ in range(3):
        engine.submit(work(f, 9, max_new_tokens=12, min_new_tokens=11))
        finish(engine)
    engine.submit(work(f, 9, max_new_tokens=12, min_new_tokens=11))
    engine.step()
    handle = f.model.language_model.decoder.register_forward_hook(lambda *_: None)
    layer = f.model.language_model.decoder.layers[0]
    second = layer.register_forward_hook(lambda *_: calls.append(1))
    try:
        replayed = recorder.replayed
        engine.submit(work(f, 12, max_new_tokens=12, min_new_tokens=11))
        engine.step()
        assert len(calls) == 1 and recorder.replayed == replayed + 1  # of the encoder, which has no hook
        assert [len(each) for each in engine._lanes.values()] == [2]
    finally:
        handle.remove()
        second.remove()
    assert len(finish(engine)) == 2


def test_cancelling_and_errors(f: Florence2, recorder: TapeRecorder) -> None:
    engine = Engine(f.model, slots=4)
    settings = {"max_new_tokens": 12, "min_new_tokens": 11}
    works = [work(f, 9, i, **settings) for i in range(6)]
    works[1] = replace(works[1], features=torch.full((1, 37, f.model.config.text.d_model), float("nan")))
    tickets = [engine.submit(each) for each in works]
    first = engine.step()
    assert [done.ticket for done in first] == [tickets[1]] and "not finite" in str(first[0].error)
    engine.cancel(tickets[0])  # runs
    engine.cancel(tickets[5])  # waits
    done = {each.ticket: each.generation for each in finish(engine)}
    assert set(done) == set(tickets[2:5])
    for i in (2, 3, 4):
        generation = done[tickets[i]]
        assert generation is not None and generation.sequences.tolist() == answer_alone(f, works[i])


@pytest.mark.release
def test_a_batch_of_the_pipeline(f: Florence2, recorder: TapeRecorder) -> None:
    images = [make_picture(seed, 64, 48) for seed in range(5)]
    requests = [(task, images[i]) for i, task in enumerate(("<OD>", "<CAPTION>", "<OCR>", "<CAPTION>", "<OD>"))]
    for _ in range(2):
        batch = f.run_batch(requests, max_new_tokens=20)
    replayed = recorder.replayed
    assert replayed > 0
    alone = [f.run(*request, max_new_tokens=20) for request in requests]
    assert recorder.replayed > replayed
    with record_with(None):
        plain = [f.run(*request, max_new_tokens=20) for request in requests]
    ids = [each.token_ids for each in plain]
    assert [each.token_ids for each in batch] == ids == [each.token_ids for each in alone]


def test_budgets_count_buckets(f: Florence2, recorder: TapeRecorder) -> None:
    """In a bucket that answers fill by one, and while they move there, three rows belong to each."""
    options, model = f.options(max_new_tokens=100), f.model
    each = generation_bytes(model.config, options, 128, model.dtype)
    assert answer_bytes(model, options, 40) == planned_bytes(model.config, options, 40, model.dtype) == 3 * each
    sampled = f.options(max_new_tokens=100, sample=True)
    assert answer_bytes(model, sampled, 40) == generation_bytes(model.config, sampled, 40, model.dtype)


def test_budgets_without_recording(f: Florence2) -> None:
    options = f.options(max_new_tokens=100)
    assert answer_bytes(f.model, options, 40) == generation_bytes(f.model.config, options, 40, f.model.dtype)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9, 17])
def test_buffers_take_no_more_than_was_planned(f: Florence2, count: int, recorder: TapeRecorder) -> None:
    """Those that answers have, and those that they leave for them."""
    options = GenerationOptions(max_new_tokens=64)
    with torch.inference_mode():
        own = open_lane(f.model, options, special_ids(f.model))
        assert own is not None
        memory, largest = torch.randn(1, 120, f.model.config.text.d_model), 0
        for i in range(count):
            before = 0 if own._steps is None else own._steps.size
            steps = own._steps
            own.join([i], memory, options)
            assert own._steps is not None
            largest = max(largest, own._steps.size + (before if steps is not own._steps else 0))
        own.close()
    assert largest <= count * planned_bytes(f.model.config, options, 120, f.model.dtype)


def test_buckets() -> None:
    assert Bucket.around(5, 577, 65, 1024) == Bucket(8, 640, 128)
    assert Bucket.around(1, 640, 1, 20) == Bucket(1, 640, 20)
    assert Bucket.around(65, 641, 600, 1000) == Bucket(128, 768, 1000)
    assert Bucket(8, 640, 128).holds(Bucket(4, 640, 64)) and not Bucket(8, 640, 128).holds(Bucket(4, 768, 64))


def test_a_lane_is_what_the_engine_expects() -> None:
    methods = {name for name in vars(OwnLane) if not name.startswith("_")} | {"__len__"}
    assert all(hasattr(RecordedLane, name) and hasattr(Lane, name) for name in methods)


def test_generate_takes_the_same_way(f: Florence2, recorder: TapeRecorder) -> None:
    asked = work(f, 9, max_new_tokens=8)
    expected = answer_alone(f, asked)
    assert asked.features is not None
    with torch.no_grad():
        memory = f.model.encode(asked.features, torch.tensor([list(asked.prompt)]))
    for _ in range(3):
        found = generate(f.model, memory, asked.options)
        assert found.sequences.tolist() == expected and not found.sequences.is_inference()
    assert recorder.replayed > 0
