"""Patches: what they change, what they leave, and that they are gone afterwards."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from florence2 import EncodedImage, Florence2, GenerationOptions
from florence2.errors import OptionError
from florence2.inspect import answer_logprobs, teacher_force
from florence2.tracing.names import names_of
from florence2.tracing.patches import at, from_run, replace, scale, scale_heads, zero, zero_heads
from tests.release import keep
from tests.traced import PROMPTS

LAYER = "decoder.layers.0"
HEADS = f"{LAYER}.cross_attention.heads"


@pytest.fixture(scope="session")
def encoded(small: Florence2, images: list[Image.Image]) -> list[EncodedImage]:
    return [small.encode_image(image) for image in images]


@pytest.fixture
def ask(small: Florence2, encoded: list[EncodedImage], beams: GenerationOptions) -> Any:
    """(which image, names to keep) -> the trace of one run."""

    def run(which: int, *names: str) -> Any:
        with small.trace(*names) as t:
            small.run("<OD>", encoded[which], options=beams)
        return t

    return run


@pytest.fixture
def memory(mini: Florence2, images: list[Image.Image]) -> Callable[[], Tensor]:
    """Return the output of the encoder in a run that writes one id."""
    image, options = mini.encode_image(images[0]), mini.options(num_beams=1, max_new_tokens=1)

    def run() -> Tensor:
        with mini.trace("memory") as t:
            mini.run("<OD>", image, options=options)
        found: Tensor = t["memory"]
        return found

    return run


def test_every_head_at_zero_is_the_sub_layer_without_its_heads(small: Florence2, ask: Any) -> None:
    """Only the output projection's bias is left of it."""
    attention = small.model.language_model.decoder.layers[0].encoder_attn
    with small.patched({HEADS: zero()}):
        t = ask(0, f"{LAYER}.cross_attention")
    with small.patched({HEADS: zero_heads(range(4))}):
        same = ask(0, f"{LAYER}.cross_attention")
    bias = attention.out_proj.bias
    assert torch.allclose(t[f"{LAYER}.cross_attention"], bias.expand_as(t[f"{LAYER}.cross_attention"]), atol=1e-6)
    with small.patched({f"{LAYER}.cross_attention": lambda value: bias.expand_as(value)}):
        removed = ask(0, LAYER)
    assert t.run.answer.token_ids == same.run.answer.token_ids == removed.run.answer.token_ids
    assert t.run.answer.token_ids != ask(0).run.answer.token_ids


def test_one_head_alone(small: Florence2, ask: Any) -> None:
    before = ask(0, HEADS)
    with small.patched({HEADS: scale_heads([2], 0.5)}):
        after = ask(0, HEADS)
    assert torch.equal(after[HEADS][0, :2], before[HEADS][0, :2])  # the first step, before answers part
    assert torch.equal(after[HEADS][0, 2], before[HEADS][0, 2] * 0.5) and before[HEADS][0, 2].abs().sum() > 0
    assert torch.equal(after[HEADS][0, 3], before[HEADS][0, 3])


@pytest.mark.parametrize(
    "name",
    keep(
        [0, 3, 6, 8],
        [
            "encoder.layers.0.self_attention.weights",
            "encoder.layers.0.mlp.hidden",
            f"{LAYER}.cross_attention.keys",
            f"{LAYER}.cross_attention.weights",
            f"{LAYER}.self_attention.weights",
            f"{LAYER}.after_self_attention",
            "scores.no_repeat_ngram",
            "logits",
            "prompt",
        ],
    ),
)
def test_its_own_value_changes_nothing(small: Florence2, ask: Any, name: str) -> None:
    plain = ask(0, "**")
    with small.patched({name: from_run(plain)}):
        same = ask(0, "**")
    for other in ("memory", LAYER, "scores"):
        assert torch.equal(same[other], plain[other])
    assert same.run.answer.token_logprobs == plain.run.answer.token_logprobs and same.beams == plain.beams


def test_the_image_of_another_run(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions, ask: Any
) -> None:
    """With the other's memory, or the other's grid, the answer is the other's to the last digit."""
    first, other = ask(0, "memory"), ask(1, "memory")
    assert first.run.answer.token_ids != other.run.answer.token_ids
    with small.patched({"memory": from_run(other)}):
        assert ask(0).run.answer.token_logprobs == other.run.answer.token_logprobs
    with small.patched({"memory": other["memory"]}):
        assert ask(0).run.answer.token_ids == other.run.answer.token_ids
    inside = "vision_tower.blocks.0.0.spatial_block.window_attn.heads"  # the stream goes past it, so not enough alone
    pixels = small.processor.image(images[1])
    more: dict[str, dict[str, Tensor]] = {"vision_tower": {}, inside: {"pixel_values": pixels}}
    for name, others in more.items():
        with small.trace(name) as t:
            small.run("<OD>", images[1], options=beams)
        with small.patched({name: from_run(t), **others}), small.trace("image_tokens") as patched:
            small.run("<OD>", images[0], options=beams)
        assert patched.run.answer.token_ids == t.run.answer.token_ids
        assert torch.allclose(patched["image_tokens"], t.run.encoded.features[0], atol=1e-5)


def test_every_name_can_be_patched(
    small: Florence2, images: list[Image.Image], encoded: list[EncodedImage], beams: GenerationOptions
) -> None:
    """Halving any value that takes part in a run changes what comes out."""
    options = beams.changed(max_new_tokens=3, min_new_tokens=3, repetition_penalty=1.1)
    names = [name for name in names_of(small.model.config) if not name.searched]

    def outcome(when: str) -> Tensor:
        if when == "image":
            features: Tensor = small.encode_image(images[0]).features
            return features
        with small.trace("scores") as t:
            small.run("<OD>", encoded[0], options=options)
        found: Tensor = t["scores"]
        return found

    plain = {when: outcome(when) for when in ("image", "answer")}
    for name in [n for n in names if ".blocks." not in n.name or ".blocks.0.0." in n.name]:
        with small.patched({name.name: lambda x: x * 0.5}):
            found = outcome(name.when)
        assert not torch.equal(found, plain["image" if name.when == "image" else "answer"]), name.name


def test_gone_after_the_block_and_after_an_exception(small: Florence2, ask: Any) -> None:
    before = ask(0)
    with pytest.raises(ZeroDivisionError), small.patched({"memory": zero()}):
        assert ask(0).run.answer != before.run.answer
        raise ZeroDivisionError
    assert ask(0).run.answer == before.run.answer and ask(0).beams == before.beams


def test_a_block_is_a_value(mini: Florence2, memory: Callable[[], Tensor]) -> None:
    """It may be entered again, within itself too, and left in any order."""
    plain, halved = memory(), mini.patched({"memory": scale(0.5)})
    added = mini.patched({"memory": lambda x: x + 1})
    for _ in range(2):
        with halved:
            assert torch.equal(memory(), plain * 0.5)
    with halved, added, halved:
        assert torch.allclose(memory(), (plain * 0.5 + 1) * 0.5, atol=1e-6)
    with halved:
        added.__enter__()
        halved.__enter__()
        added.__exit__(None, None, None)
        assert torch.equal(memory(), plain * 0.25)
        halved.__exit__(None, None, None)
    assert torch.equal(memory(), plain)


def test_a_function_that_writes_into_its_value(
    mini: Florence2, images: list[Image.Image], memory: Callable[[], Tensor]
) -> None:
    """It changes the run, and neither the encoded image nor what a trace keeps by another name."""
    image = mini.encode_image(images[0])
    before, case = image.features.clone(), teacher_force(mini, ("<OD>", image), "a square</s>")
    with mini.patched({"image_tokens": lambda x: x.mul_(0)}):
        assert not torch.equal(answer_logprobs(mini, case, "prompt"), case.logprobs)
    assert torch.equal(image.features, before)
    last, plain = f"encoder.layers.{mini.model.config.text.encoder_layers - 1}", memory()
    with mini.patched({"memory": at(lambda x: x.zero_(), positions=[1])}), mini.trace(f"={last}") as t:
        changed = memory()
    assert torch.equal(t[last], plain) and not changed[1].any()
    assert torch.equal(changed[2:], plain[2:])


def test_patches_compose_outer_first(small: Florence2, ask: Any) -> None:
    plain = ask(0, "memory")["memory"]
    with small.patched({"memory": lambda x: x + 1}), small.patched({"memory": scale(2), "mem*": lambda x: x - 3}):
        found = ask(0, "memory")["memory"]
    assert torch.allclose(found, (plain + 1) * 2 - 3, atol=1e-6)


def test_a_trace_shows_what_the_run_goes_on_with_wherever_it_stands(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions
) -> None:
    with small.trace("memory") as outer, small.patched({"memory": zero()}), small.trace("memory") as inner:
        small.run("<OD>", images[0], options=beams)
    assert not outer["memory"].any() and not inner["memory"].any()


def test_confined_to_steps(small: Florence2, ask: Any) -> None:
    before = ask(0, f"{LAYER}.mlp", LAYER)
    with small.patched({f"{LAYER}.mlp": at(zero(), steps=[1, 2])}):
        after = ask(0, f"{LAYER}.mlp", LAYER)
    mlp = after[f"{LAYER}.mlp"]
    assert torch.equal(mlp[0], before[f"{LAYER}.mlp"][0])
    assert not mlp[1:3].any() and mlp[3:].all(dim=-1).all()


def test_confined_to_positions(small: Florence2, images: list[Image.Image], ask: Any) -> None:
    before = ask(0, "memory", f"{LAYER}.cross_attention")
    with small.patched({"memory": at(zero(), positions=range(1, 40))}):
        memory = ask(0, "memory")["memory"]
    assert not memory[1:40].any()
    assert torch.equal(memory[:1], before["memory"][:1]) and torch.equal(memory[40:], before["memory"][40:])
    with small.patched({f"{LAYER}.cross_attention.weights": at(zero(), positions=slice(0, 570), heads=[1])}):
        weights = ask(0, f"{LAYER}.cross_attention.weights")[f"{LAYER}.cross_attention.weights"]
    assert not weights[:, 1, :, :570].any() and weights[:, 1, :, 570:].all() and weights[:, 0].all()
    with small.patched({"vision_tower": at(zero(), positions=[0, 28 * 3 + 5])}), small.trace("vision_tower") as t:
        small.encode_image(images[0])
    grid = t["vision_tower"].any(dim=-1)
    assert (~grid).nonzero().tolist() == [[0, 0], [3, 5]]


def test_a_batch_is_patched_row_by_row(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions, ask: Any
) -> None:
    """One tensor without B serves every request, in a padded batch too."""
    other = ask(1, "=decoder.layers.*", "image_tokens")
    requests = [("<OD>", images[0], None), (PROMPTS[2][0], images[0], PROMPTS[2][1])]
    for name in ("image_tokens", LAYER):
        with small.patched({name: from_run(other)}), small.trace(name) as t:
            answers = small.run_batch(requests, options=beams)
        assert len(answers) == 2
        for run in t.runs:
            steps = min(len(run[name]), len(other[name]))
            assert torch.equal(run[name][:steps], other[name][:steps])
    with small.patched({"image_tokens": from_run(other)}):
        answers = small.run_batch(requests, options=beams)
    expected = small.run_batch([(task, images[1], text) for task, _, text in requests], options=beams)
    assert [a.token_ids for a in answers] == [a.token_ids for a in expected]


def test_threads_with_one_model(small: Florence2, images: list[Image.Image], beams: GenerationOptions) -> None:
    """Two of them in the same block."""
    encoded = small.encode_image(images[0])
    shared = small.patched({"memory": scale(0.5)})
    blocks = [shared, small.patched({"memory": scale(-1.0)}), small.patched({}), shared]

    def work(i: int, together: threading.Barrier | None) -> list[Any]:
        with blocks[i]:
            if together is not None:
                together.wait(timeout=60)
            return [small.run("<OD>", encoded, options=beams).token_ids for _ in range(3)]

    alone = [work(i, None) for i in range(4)]
    assert len({str(answers) for answers in alone}) == 3
    barrier = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda i: work(i, barrier), range(4)))
    assert together == alone


@pytest.mark.parametrize(
    ("patches", "message"),
    [
        (
            {"decoder.layers.0.cross_atention.heads": zero()},
            "The nearest names are .*decoder.layers.0.cross_attention.heads",
        ),
        (
            {"decoder": zero()},
            r"'decoder' has no value of its own, only names below it: decoder.\*\* selects",
        ),  # a module without a value
        ({"search.survivors": zero()}, "called 'search.survivors'"),
        ({"memory": 0.5}, "The patch of memory is '0.5'; it must be a tensor, a function of one, or a Patch"),
        ({3: zero()}, "A name or pattern is text, such as 'decoder.layers.*', not '3'"),
        ([("memory", zero())], "give a mapping from names"),
    ],
)
def test_wrong_patches_are_refused_at_once(small: Florence2, patches: Any, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        small.patched(patches)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: scale("a"), "The factor of scale is 'a'; it must be a number"),
        (lambda: scale(torch.ones(3)), "The factor of scale is .* it must be a number"),
        (lambda: replace([1.0]), "replace takes a tensor, not list"),
        (lambda: from_run("run"), "from_run takes a trace, or one of its runs or images, not str"),
        (lambda: zero_heads(3), r"heads is 3; it must be several whole numbers from 0, as \[3\]"),
        (lambda: zero_heads(cast(Any, [1.5])), r"heads is \[1.5\]; it must be several whole numbers"),
        *(
            (lambda numbers=numbers: zero_heads(numbers), "it must be several whole numbers from 0")
            for numbers in (
                torch.ones(2),
                torch.ones(2).bool(),
                torch.tensor([1j]),
                torch.tensor([[1]]),
                torch.tensor([-1]),
            )
        ),
        *((lambda number=number: zero_heads([number]), "several whole numbers from 0") for number in (True, -1, "1")),
        (lambda: at(zero(), steps=[-1]), r"steps is \[-1\]"),
        (lambda: at(zero(), steps=slice(2)), "steps is slice"),
        (lambda: at(zero(), positions="12"), "positions is 12"),
        (lambda: at(zero(), positions=torch.tensor([True, False])), "positions is tensor"),
    ],
)
def test_patches_that_cannot_be_made(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        make()


def test_numbers_of_any_library_choose(memory: Callable[[], Tensor], mini: Florence2) -> None:
    for positions in ([2], (2,), {2}, range(2, 3), np.array([2]), torch.tensor([2])):
        with mini.patched({"memory": at(zero(), positions=positions)}):
            assert (~memory().any(dim=1)).nonzero().tolist() == [[2]]


@pytest.mark.parametrize(
    ("name", "patch", "message"),
    [
        ("memory", torch.zeros(3, 4), r"has the shape \(3, 4\), but the value there has \(1, 574, 64\), \(B, S, D\)"),
        ("memory", lambda x: x[:, :5], r"memory has the shape \(1, 5, 64\), but the value there has \(1, 574, 64\)"),
        ("memory", lambda x: 3, "The patch of memory returned int; it must return a tensor"),
        ("memory", lambda x: x.to(torch.complex64), "has type torch.complex64, which cannot be cast to torch.float32"),
        (HEADS, replace(torch.zeros(4, 3, 15)), r"\(4, 3, 15\), but the value there has \(1, 4, 3, 16\)"),
        (HEADS, zero_heads([4]), f"{HEADS} has 4 heads, 0 to 3; head 4 does not exist"),
        ("memory", zero_heads([0]), r"memory has no heads: its shape is \(B, S, D\)"),
        ("memory", at(zero(), positions=[574]), "memory has 574 positions, 0 to 573; position 574 does not exist"),
        (LAYER, at(zero(), positions=[0]), "has no positions to choose from"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_a_sentence(small: Florence2, ask: Any, name: str, patch: Any, message: str) -> None:
    with small.patched({name: patch}), pytest.raises(OptionError, match=message):
        ask(0)


def test_another_run_must_have_kept_the_name_and_have_the_shape(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions, ask: Any
) -> None:
    other = ask(1, "memory")
    with small.patched({"logits": from_run(other)}), pytest.raises(OptionError, match="'logits' was not kept"):
        ask(0)
    fewer = beams.changed(num_beams=2)
    with small.trace(HEADS) as t:
        small.run("<OD>", images[0], options=fewer)
    with small.patched({HEADS: from_run(t)}), pytest.raises(OptionError, match=r"\(4, 2, 16\), but .* \(1, 4, 3, 16\)"):
        ask(0)


def test_patches_say_what_they_are() -> None:
    assert repr(at(zero(), steps=[1], heads=[2])) == "at(zero(), steps=[1], heads=[2])"
    assert repr(scale(0.5)) == "scale(0.5)" and repr(replace(torch.zeros(2, 3))) == "replace((2, 3))"
