"""The decoder's direct step gives the plain step's numbers, and sees every change at the next step."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import florence2
from florence2.fast import decoder as direct
from florence2.fast.decoder import DirectDecoder
from florence2.fast.linear import Linear
from florence2.generation.engine.slots import SlotCache
from florence2.model.bart import Attention, Decoder, DecoderLayer
from florence2.model.cache import DecoderCache, OwnPast
from florence2.model.florence2 import Florence2Model

BEAMS, SOURCE, STEPS = 3, 20, 4


@pytest.fixture(scope="module")
def nano() -> Florence2Model:
    """Copy it before you change it."""
    return florence2.load("nano", device="cpu").model


@pytest.fixture
def model(nano: Florence2Model) -> Florence2Model:
    return copy.deepcopy(nano)


def memory_of(model: Florence2Model, images: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, SOURCE, model.config.text.d_model, generator=generator)


def ids_of(images: int, step: int) -> Tensor:
    return torch.arange(images * BEAMS) * 7 + 11 * step + 5


def run_steps(model: Florence2Model, images: int = 2, change: Callable[[], object] | None = None) -> Tensor:
    """Return the logits of a few steps; `change` happens after the second."""
    logits = []
    with torch.inference_mode():
        cache = model.start_cache(memory_of(model, images), BEAMS, STEPS)
        for step in range(STEPS):
            if step == 2 and change is not None:
                change()
            logits.append(model.step(ids_of(images, step), cache))
    return torch.stack(logits)


def plain(model: Florence2Model) -> Florence2Model:
    """Let the decoder call its layers; every linear map keeps its routine, so that the numbers are the same bits."""
    model.language_model.decoder.__class__ = Decoder
    return model


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The index of each layer that was computed directly."""
    seen: list[int] = []
    step = direct._DirectLayer.step

    def count(self: Any, x: Tensor, cache: DecoderCache, index: int) -> Tensor:
        seen.append(index)
        return step(self, x, cache, index)

    monkeypatch.setattr(direct._DirectLayer, "step", count)
    return seen


@pytest.mark.parametrize("images", [1, 2, 12])  # twelve have rows for the measured routines
def test_equals_the_plain_step(model: Florence2Model, images: int, calls: list[int]) -> None:
    assert type(model.language_model.decoder) is DirectDecoder
    found = run_steps(model, images)
    assert calls == [0, 1, 2] * STEPS
    assert torch.equal(run_steps(plain(model), images), found) and len(calls) == 3 * STEPS
    assert not torch.equal(found[0], found[1])


def test_equals_the_plain_step_with_slots(model: Florence2Model, calls: list[int]) -> None:
    def steps() -> Tensor:
        cache = SlotCache(model.language_model.decoder, BEAMS, 4, model.device)
        with torch.inference_mode():
            cache.join(memory_of(model, 2))
            logits = [model.step(ids_of(2, 0), cache), model.step(ids_of(2, 1), cache)]
            cache.join(memory_of(model, 1, seed=1))  # from now on at different positions
            logits += [model.step(ids_of(3, step), cache) for step in (2, 3)]
        return torch.cat(logits)

    found = steps()
    assert len(calls) == 12
    plain(model)
    assert torch.equal(steps(), found) and len(calls) == 12


def layer(model: Any) -> Any:
    return model.language_model.decoder.layers[1]


def hook(model: Any) -> None:
    layer(model).fc1.register_forward_hook(lambda _module, _inputs, out: out + 1.0)


def pre_hook(model: Any) -> None:
    layer(model).register_forward_pre_hook(lambda _module, inputs: (inputs[0] + 1.0, *inputs[1:]))


def replace_part(model: Any) -> None:
    layer(model).self_attn.q_proj = nn.Linear(160, 160)


def replace_by_same_class(model: Any) -> None:
    part = Linear(160, 160).eval()
    nn.init.constant_(part.weight, 0.01)
    layer(model).encoder_attn.out_proj = part


def replace_layer(model: Any) -> None:
    model.language_model.decoder.layers[1] = model.language_model.decoder.layers[2]


def remove_layer(model: Any) -> None:
    del model.language_model.decoder.layers[2]


def replace_list(model: Any) -> None:
    model.language_model.decoder.layers = nn.ModuleList(list(model.language_model.decoder.layers)[::-1])


def patch_method(model: Any) -> None:
    layer(model).add_mlp = lambda x, trace: x


def patch_forward(model: Any) -> None:
    layer(model).self_attn_layer_norm.forward = lambda x: x


def replace_parameter(model: Any) -> None:
    layer(model).fc2.weight = nn.Parameter(layer(model).fc2.weight * 2)


def replace_parameter_by_tensor(model: Any) -> None:
    weight = layer(model).fc2.weight.detach() * 2
    del layer(model).fc2.weight
    layer(model).fc2.weight = weight


def write_weight(model: Any) -> None:
    with torch.no_grad():
        layer(model).fc1.weight.mul_(-1)


def write_data(model: Any) -> None:
    layer(model).self_attn.v_proj.weight.data.mul_(-1)


def change_activation(model: Any) -> None:
    layer(model).activation = F.relu


def change_epsilon(model: Any) -> None:
    layer(model).final_layer_norm.eps = 0.5


def change_class(model: Any) -> None:
    class Doubled(Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer(model).fc1.__class__ = Doubled


def dropout(model: Any) -> None:
    layer(model).dropout = 1.0
    layer(model).train()


CHANGES = [
    hook,
    pre_hook,
    replace_part,
    replace_by_same_class,
    replace_layer,
    remove_layer,
    replace_list,
    patch_method,
    patch_forward,
    replace_parameter,
    replace_parameter_by_tensor,
    write_weight,
    write_data,
    change_activation,
    change_epsilon,
    change_class,
    dropout,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_at_the_next_step(
    model: Florence2Model, nano: Florence2Model, change: Callable[[Any], None]
) -> None:
    before = run_steps(model)
    torch.manual_seed(0)
    found = run_steps(model, change=lambda: change(model))
    assert torch.equal(found[:2], before[:2]) and not torch.allclose(found[2:], before[2:], atol=1e-3)

    other = plain(copy.deepcopy(nano))
    torch.manual_seed(0)
    assert torch.equal(run_steps(other, change=lambda: change(other)), found)


def shout(self: Any, x: Tensor, *_: Any) -> Tensor:
    return x * 2


@pytest.mark.parametrize(
    ("owner", "name", "method"),
    [
        (DecoderLayer, "add_mlp", shout),
        (Attention, "forward", shout),
        (Linear, "forward", lambda self, x: x @ self.weight.T),
        (nn.Linear, "forward", lambda self, x: x @ self.weight.T),
        (nn.LayerNorm, "forward", shout),
        (OwnPast, "as_queries", lambda self, x: -self.cache.beams_as_queries(x)),
        (DecoderCache, "beams_as_queries", lambda self, x: -x.view(-1, self.beams, x.shape[-1])),
    ],
)
def test_a_replaced_method_is_seen(
    model: Florence2Model, owner: type, name: str, method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_steps(model)
    found = run_steps(model, change=lambda: monkeypatch.setattr(owner, name, method))
    assert torch.equal(found[:2], before[:2]) and not torch.equal(found[2:], before[2:])
    monkeypatch.undo()
    assert torch.equal(run_steps(model), before)


def test_eager_attention_and_traces_take_the_plain_step(model: Florence2Model, calls: list[int]) -> None:
    layer(model).encoder_attn.attention = "eager"
    run_steps(model)
    assert calls == []
    layer(model).encoder_attn.attention = "sdpa"
    run_steps(model)
    assert len(calls) == 3 * STEPS


def test_gradients_take_the_plain_step(model: Florence2Model, calls: list[int]) -> None:
    cache = model.start_cache(memory_of(model, 1), BEAMS, STEPS)
    model.step(ids_of(1, 0), cache)
    assert calls == []


def test_a_cache_that_brings_its_own_sources(model: Florence2Model, calls: list[int]) -> None:
    class Deaf(DecoderCache):
        def memory(self, layer: int) -> Any:
            return self.past(layer)

    with torch.inference_mode():
        deaf = Deaf(model.language_model.decoder, memory_of(model, 1), BEAMS, STEPS)
        model.step(ids_of(1, 0), deaf)
        assert calls == []
        cache = DecoderCache(model.language_model.decoder, memory_of(model, 1), BEAMS, STEPS)
        cache.memory = cache.past  # type: ignore[method-assign, assignment]
        model.step(ids_of(1, 0), cache)
    assert calls == []


def test_copies_of_a_model_are_models_of_their_own(model: Florence2Model, calls: list[int]) -> None:
    before = run_steps(model)
    twin = copy.deepcopy(model)
    write_weight(twin)
    assert torch.equal(run_steps(model), before) and not torch.equal(run_steps(twin), before)
    assert len(calls) == 3 * 3 * STEPS
