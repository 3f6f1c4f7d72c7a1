"""Blocks and layers by kernels against the plain formula, and when they step aside; on a CPU by the interpreter."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from florence2 import Florence2, explain_path
from florence2.fast.cuda import blocks, layers
from florence2.fast.cuda.kernels import availability
from florence2.fast.cuda.kernels.availability import rehearsal
from florence2.fast.install import install, uninstall
from florence2.model.attention import ACTIVATIONS
from florence2.model.bart import DecoderLayer, EncoderLayer
from florence2.model.davit import ChannelBlock, SpatialBlock
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import NO_TRACE, Trace
from tests.fast.test_changes import CHANGES, Parts
from tests.release import keep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# how far from the formula in double, by how far the plain one is; the interpreter cuts bfloat16 off
TOLERANCES = {torch.float32: 2.0, torch.float16: 1.5, torch.bfloat16: 4.0}


@pytest.fixture(autouse=True)
def _rehearsal() -> Iterator[None]:
    with rehearsal():
        yield


@pytest.fixture
def plain(mini: Florence2) -> Florence2Model:
    return uninstall(copy.deepcopy(mini.model)).to(DEVICE)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list that grows by the name of each part that is computed by kernels."""
    parts: list[str] = []
    for module, name in ((blocks, "_add_rest"), (layers, "_mlp")):
        function = getattr(module, name)

        def count(part: Any, x: Tensor, function: Any = function) -> Tensor:
            parts.append(type(part).__name__)
            out: Tensor = function(part, x)
            return out

        monkeypatch.setattr(module, name, count)
    return parts


def fast(plain: Florence2Model) -> Florence2Model:
    return install(copy.deepcopy(plain))


def pixels(model: Florence2Model, height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(2, 3, height, width, generator=generator).to(model.device, model.dtype)


PROMPTS = [[0, 14, 2, 1], [0, 11, 12, 2]]  # one is padded
IDS = [[2, 9], [2, 40]]
PARENTS = [[1, 0], [0, 0]]


@torch.inference_mode()
def results(model: Florence2Model, image: Tensor) -> dict[str, Tensor]:
    """What each stage gives: the tower, the encoder, a decoder over whole sequences, and steps with beams."""
    prompt = torch.tensor(PROMPTS[: len(image)], device=image.device)
    mask = prompt != 1
    features = model.encode_image(image)
    memory = model.encode(features, prompt, mask)
    memory_mask = model.memory_mask(features, mask)
    ids = torch.tensor(IDS[: len(image)], device=image.device)
    uncached = model.decode(ids, memory, memory_mask)
    cache, found = model.start_cache(memory, 2, 4, memory_mask), []
    for newest in ids.T:
        found.append(model.step(newest.repeat_interleave(2), cache))
        cache.reorder(torch.tensor(PARENTS[: len(image)], device=image.device))
    return {"features": features, "memory": memory, "logits": uncached, "steps": torch.stack(found)}


def differences(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, float]:
    return {name: (value.double() - other[name].double()).abs().max().item() for name, value in one.items()}


@pytest.mark.parametrize("dtype", keep([list(TOLERANCES).index(torch.float16)], TOLERANCES), ids=str)
def test_every_stage_is_the_plain_formula(plain: Florence2Model, dtype: torch.dtype, counted: list[str]) -> None:
    exact = copy.deepcopy(plain).double()
    plain.to(dtype)
    model = fast(plain)
    found, expected = results(model, pixels(plain)), results(exact, pixels(exact))
    usual = results(plain, pixels(plain))
    assert [value.dtype for value in found.values()] == [value.dtype for value in usual.values()]
    wrong, usually_wrong = differences(found, expected), differences(usual, expected)
    assert all(wrong[name] < TOLERANCES[dtype] * usually_wrong[name] + 1e-6 for name in wrong)
    text, vision = plain.config.text, 2 * sum(plain.config.vision.depths)
    assert len(counted) == vision + text.encoder_layers + text.decoder_layers * (1 + len(IDS[0]))


@pytest.mark.release
@pytest.mark.parametrize("size", [(70, 66), (96, 64)])
@torch.inference_mode()
def test_grids_that_windows_do_not_divide(plain: Florence2Model, size: tuple[int, int]) -> None:
    image = pixels(plain, *size)
    before = image.clone()
    difference = (fast(plain).vision_tower(image) - plain.vision_tower(image)).abs().max().item()
    assert difference < 5e-5 and torch.equal(image, before)


@pytest.mark.release
@pytest.mark.parametrize("activation", ["relu", "gelu_new"])
def test_other_activations(plain: Florence2Model, activation: str) -> None:
    for part in plain.modules():
        if hasattr(part, "activation"):
            vars(part)["activation"] = ACTIVATIONS[activation]
    found = differences(results(fast(plain), pixels(plain)), results(plain, pixels(plain)))
    assert max(found.values()) < 5e-5


SOME = """
    fc2 reversed by .data, another activation by class, hook on the key projection
"""
MORE = """
    fc1 new parameter, embedding rows exchanged by .data, output bias replaced, a layer twice,
    cross-attention heads pruned, eps of a norm, pre-hook on fc2, keys_values of attention, window of the tower,
    untied head, self-attention heads rolled, a norm replaced, hook in the tower
"""
"""Of the changes that touch what is read by address here, or what is not called, one of each kind; most of a minute."""
CHANGED = [" ".join(name.split()) for name in SOME.split(",")]
CHANGED_TOO = [pytest.param(" ".join(name.split()), marks=pytest.mark.release) for name in MORE.split(",")]


@pytest.mark.parametrize("change", [*CHANGED, *CHANGED_TOO])
def test_a_changed_model_never_gives_the_old_answer(plain: Florence2Model, change: str) -> None:
    model, image = fast(plain), pixels(plain, 32, 64)[:1]
    before = results(plain, image)
    for each in (model, plain):
        CHANGES[change](Parts.of(each))
    found, expected = results(model, image), results(plain, image)
    assert max(differences(found, expected).values()) < 2e-4
    assert max(differences(before, expected).values()) > 1e-3


def make_eager(model: nn.Module) -> None:
    for part in model.modules():
        vars(part)["attention"] = "eager"


def drop_bias(model: nn.Module) -> None:
    for part in model.modules():
        if isinstance(part, nn.LayerNorm):
            part.register_parameter("bias", None)


STEPS_ASIDE: dict[str, Callable[[Any], object]] = {
    "trace": lambda model: None,
    "gradients": lambda model: torch.set_grad_enabled(True),
    "double": lambda model: model.double(),
    "training": lambda model: model.train(),
    "eager": make_eager,
    "no bias": drop_bias,
    "no Triton": lambda model: availability._has_triton.cache_clear(),
}


@pytest.mark.parametrize("reason", STEPS_ASIDE)
@torch.no_grad()
def test_when_the_plain_code_runs(
    plain: Florence2Model, reason: str, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "no Triton":
        monkeypatch.setattr(availability, "_has_triton", lambda: False)
    model, image = fast(plain), pixels(plain)
    if reason != "no Triton":
        STEPS_ASIDE[reason](model)
    trace = _Looks() if reason == "trace" else NO_TRACE
    features = model.encode_image(image.to(model.dtype), trace)
    model.encode(features, torch.tensor([[0, 2]] * 2, device=DEVICE), trace=trace)
    assert counted == []
    torch.set_grad_enabled(False)


class _Looks(Trace):
    """A trace that looks into every module."""

    def enters(self, prefix: str) -> bool:
        return True


def test_gradients_flow(plain: Florence2Model) -> None:
    model, image = fast(plain), pixels(plain).requires_grad_()
    model.encode(model.encode_image(image), torch.tensor([[0, 2]] * 2, device=DEVICE)).sum().backward()
    assert image.grad is not None and image.grad.any()


@torch.inference_mode()
def test_a_cpu_keeps_to_its_own_ways(mini: Florence2, counted: list[str]) -> None:
    availability._rehearsing.set(False)
    model = copy.deepcopy(mini.model)
    results(model, pixels(model))
    assert counted == []


def test_installed_classes_can_be_undone(plain: Florence2Model) -> None:
    kinds = (SpatialBlock, ChannelBlock, EncoderLayer, DecoderLayer)
    original = [type(part) for part in plain.modules()]
    model = install(plain)
    assert not any(type(part) in kinds for part in model.modules())
    assert [type(part) for part in uninstall(model).modules()] == original


def test_what_is_said_about_it(mini: Florence2, plain: Florence2Model) -> None:
    f = Florence2(fast(plain), mini.processor)

    def lines() -> dict[str, str]:
        return dict(line.split(": ", 1) for line in explain_path(f).splitlines())

    said = lines()
    assert said["vision tower"] == "all 4 blocks by kernels" and said["text layers"] == "all 4 by kernels"
    assert said["weights laid out"] == "output projection; queries, keys and values of 6 of 6 attentions"
    layer: Any = f.model.language_model.decoder.layers[0]
    layer.fc1.register_forward_hook(lambda *_: None)
    layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)
    f.model.final_logits_bias = f.model.final_logits_bias.clone()
    said = lines()
    assert said["text layers"] == (
        "3 of 4 by kernels; plain: language_model.decoder.layers.0.self_attn.q_proj is of the class Sequential, which "
        "the faster way does not know"
    )
    assert said["weights laid out"] == "none: the output projection was given other memory since the model was loaded"
