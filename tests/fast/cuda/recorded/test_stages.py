"""Images and prompts by replay: what the plain stages give, whatever fills the bucket."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from florence2.errors import PromptError
from florence2.fast.cuda.recorded.graphs import record_with, recordings
from florence2.fast.cuda.recorded.stages import TOGETHER
from florence2.fast.install import install, uninstall
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import Trace
from parity.cases import shapes
from parity.recipe import make_model
from parity.tape import TapeRecorder
from tests.release import keep


@pytest.fixture(autouse=True)
def recorder() -> Iterator[TapeRecorder]:
    recorder = TapeRecorder()
    with record_with(recorder), torch.no_grad():
        yield recorder


@pytest.fixture(scope="module")
def plain() -> Florence2Model:
    shape = shapes()[3]
    return uninstall(make_model(shape.config, shape.seed, shape.end_bonus))


@pytest.fixture
def model(plain: Florence2Model) -> Florence2Model:
    return install(copy.deepcopy(plain))


def pixels(count: int, seed: int = 0, side: int = 64) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def prompts(count: int, length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, 900, (count, length), generator=torch.Generator().manual_seed(seed))


def close(one: Tensor, other: Tensor) -> None:
    assert one.is_contiguous() and not one.is_inference() and not one.requires_grad
    torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", keep([0, 3], [1, 2, 3, 5, TOGETHER[-1], TOGETHER[-1] + 3]))
def test_images(model: Florence2Model, plain: Florence2Model, recorder: TapeRecorder, count: int) -> None:
    for seed in range(4):
        close(model.encode_image(pixels(count, seed)), plain.encode_image(pixels(count, seed)))
    assert recorder.replayed > 0


def test_any_number_of_images_is_replayed_from_few_recordings(model: Florence2Model, recorder: TapeRecorder) -> None:
    for _ in range(2):
        for count in TOGETHER:
            model.encode_image(pixels(count))
    recorded = recorder.recorded
    assert recorded == len(TOGETHER)
    for count in range(1, 20):
        model.encode_image(pixels(count))
    assert recorder.recorded == recorded


def test_images_of_another_size_and_type(model: Florence2Model, plain: Florence2Model) -> None:
    for side in (64, 96, 64, 96, 64, 96):
        close(model.encode_image(pixels(2, 0, side)), plain.encode_image(pixels(2, 0, side)))
    close(model.encode_image(pixels(2).double()), plain.encode_image(pixels(2)))
    assert model.encode_image(pixels(0)).shape[0] == 0


def test_what_was_returned_is_not_written_over(model: Florence2Model) -> None:
    found = [model.encode_image(pixels(2, seed)) for seed in range(4)]
    kept = [each.clone() for each in found]
    model.encode_image(pixels(2, 9))
    assert all(torch.equal(one, other) for one, other in zip(found, kept, strict=True))


def test_an_image_that_is_not_finite_does_not_reach_the_others(model: Florence2Model, plain: Florence2Model) -> None:
    bad = pixels(3)
    bad[1] = float("nan")
    for _ in range(3):
        found = model.encode_image(bad)
        assert found[1].isnan().all()
        close(found[0], plain.encode_image(pixels(3))[0])
    close(model.encode_image(pixels(3)), plain.encode_image(pixels(3)))


@pytest.mark.parametrize("count", keep([1, 2], [1, 3, TOGETHER[-1] + 1]))
@pytest.mark.parametrize("length", keep([0, 1], [1, 7, 150]))
def test_prompts(model: Florence2Model, plain: Florence2Model, recorder: TapeRecorder, count: int, length: int) -> None:
    features, mask = plain.encode_image(pixels(count)), torch.ones(count, length, dtype=torch.long)
    mask[-1, (length + 1) // 2 :] = 0
    for seed in range(3):
        ids = prompts(count, length, seed)
        close(model.encode(features, ids), plain.encode(features, ids))
        real = plain.memory_mask(features, mask)
        found, expected = model.encode(features, ids, mask), plain.encode(features, ids, mask)
        close(found[real], expected[real])
    assert recorder.replayed > 0


def test_every_length_is_replayed(model: Florence2Model, plain: Florence2Model, recorder: TapeRecorder) -> None:
    features = plain.encode_image(pixels(1))
    for length in (1, 100, 200) * 2:  # of three buckets
        model.encode(features, prompts(1, length))
    recorded = recorder.recorded
    for length in range(1, 201):
        close(model.encode(features, prompts(1, length)), plain.encode(features, prompts(1, length)))
    assert (recorder.recorded, recorded) == (3, 3)


def test_prompts_up_to_the_last_position(model: Florence2Model, plain: Florence2Model) -> None:
    features = plain.encode_image(pixels(1))
    room = model.config.text.max_position_embeddings - features.shape[1]
    for _ in range(3):
        close(model.encode(features, prompts(1, room)), plain.encode(features, prompts(1, room)))
        with pytest.raises(PromptError, match="positions"):
            model.encode(features, prompts(1, room + 1))


def test_weights_in_place_and_swapped_modules(model: Florence2Model, recorder: TapeRecorder) -> None:
    features, ids = model.encode_image(pixels(1)), prompts(1, 5)
    for _ in range(2):
        model.encode_image(pixels(1))
        model.encode(features, ids)
    recorded = recorder.recorded
    layer: Any = model.language_model.encoder.layers[0]
    block: Any = model.vision_tower.blocks[0][0].spatial_block
    for part in (layer.fc1, block.ffn.fc1):
        part.weight.mul_(-2)
    for run in (lambda m: m.encode_image(pixels(1)), lambda m: m.encode(features, ids)):
        close(run(model), run(uninstall(copy.deepcopy(model))))
    assert recorder.recorded == recorded
    layer.fc1, block.ffn.fc1 = copy.deepcopy(layer.fc1), copy.deepcopy(block.ffn.fc1)
    for part in (layer.fc1, block.ffn.fc1):
        part.weight.mul_(-3)
    for _ in range(3):
        for run in (lambda m: m.encode_image(pixels(1)), lambda m: m.encode(features, ids)):
            close(run(model), run(uninstall(copy.deepcopy(model))))


@pytest.mark.parametrize("stage", ["image", "prompt"])
def test_hooks_traces_and_gradients_take_the_plain_way(
    model: Florence2Model, recorder: TapeRecorder, stage: str
) -> None:
    features, ids = model.encode_image(pixels(1)), prompts(1, 5)
    trace, calls = _Seen(), []

    def run(**options: Any) -> Tensor:
        return model.encode_image(pixels(1), **options) if stage == "image" else model.encode(features, ids, **options)

    for _ in range(3):
        run()
    replayed = recorder.replayed
    run(trace=trace)
    assert trace.names
    with torch.enable_grad():
        assert run().requires_grad
    layer = model.vision_tower.blocks[0][0] if stage == "image" else model.language_model.encoder.layers[0]  # type: ignore[index]
    handle = layer.register_forward_hook(lambda *_: calls.append(1))
    run()
    assert calls and recorder.replayed == replayed
    handle.remove()
    run()
    assert recorder.replayed == replayed + 1


def test_only_some_buffers_are_kept(model: Florence2Model) -> None:
    for _ in range(3):
        model.encode_image(pixels(1))
        model.encode_image(pixels(2))
    assert len(recordings(model)) == 2


class _Seen(Trace):
    def __init__(self) -> None:
        self.names: list[str] = []

    def enters(self, prefix: str) -> bool:
        self.names.append(prefix)
        return False
