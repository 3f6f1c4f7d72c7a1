"""Weights laid out for joint products: the parameters' own memory, so that nothing can be out of date."""

import copy
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from florence2 import Florence2, load
from florence2.checkpoints.checks.loading import Parts
from florence2.fast.cuda.kernels import availability
from florence2.fast.cuda.kernels.availability import rehearsal
from florence2.fast.cuda.weights import joined, joint_map, lay_out, padded, project
from florence2.fast.install import install, uninstall
from florence2.model.bart import Attention
from florence2.model.florence2 import Florence2Model
from parity.cases import shapes
from parity.recipe import make_model
from tests.conftest import few_words


@pytest.fixture(autouse=True)
def _rehearsal() -> Iterator[None]:
    with rehearsal():
        yield


@pytest.fixture(scope="module")
def original() -> Florence2Model:
    shape = few_words(shapes()[3])
    return make_model(shape.config, shape.seed, shape.end_bonus)


@pytest.fixture
def plain(original: Florence2Model) -> Florence2Model:
    return copy.deepcopy(original)


@pytest.fixture
def model(plain: Florence2Model) -> Florence2Model:
    return install(copy.deepcopy(plain))


def attentions(model: nn.Module) -> list[Attention]:
    return [part for part in model.modules() if isinstance(part, Attention)]


def hidden(model: Florence2Model, rows: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, 1, model.config.text.d_model, generator=generator, dtype=model.dtype)


def is_laid_out(model: Florence2Model) -> bool:
    with torch.no_grad():
        joint = all(joint_map(attention) is not None for attention in attentions(model))
        wide = project(hidden(model), model.output_weight, model.final_logits_bias[0])
    return joint and wide is not None


def test_values_names_and_parameters_stay(plain: Florence2Model) -> None:
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    parameters = dict(plain.named_parameters())
    assert not is_laid_out(plain)
    assert is_laid_out(install(plain))
    assert dict(plain.named_parameters()).keys() == parameters.keys()
    assert all(parameter is parameters[name] for name, parameter in plain.named_parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert all(parameter.is_contiguous() and parameter.requires_grad for parameter in plain.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@torch.inference_mode()
def test_logits_are_those_of_the_plain_product(plain: Florence2Model, dtype: torch.dtype) -> None:
    plain.to(dtype)
    with torch.inference_mode(False):
        model = install(copy.deepcopy(plain))
    found, expected = model.logits(hidden(model)), plain.logits(hidden(plain))
    assert found.shape == expected.shape and found.dtype == expected.dtype == torch.float32
    assert found.isfinite().all() and found.stride(-1) == 1
    exact = copy.deepcopy(plain).double().logits(hidden(plain).double())
    wrong, usually = ((each - exact).abs().max().item() for each in (found, expected))
    assert wrong <= (1.5 if dtype == torch.float32 else 0.2) * usually + 1e-6


@torch.inference_mode()
def test_the_padding_is_minus_infinity_and_not_seen(model: Florence2Model) -> None:
    V = model.config.text.vocab_size
    columns = -(-V // 64) * 64
    bias = padded(model.final_logits_bias[0], columns)
    assert bias is not None and columns > V and torch.equal(bias[V:], torch.full((columns - V,), -torch.inf))
    weight = padded(model.output_weight, columns)
    assert weight is not None and not weight[V:].any()
    assert model.logits(hidden(model)).shape[-1] == V


CHANGES: dict[str, Callable[[Any], object]] = {
    "in place": lambda weight: weight.mul_(1.5),
    "by .data": lambda weight: weight.data.copy_(weight.data.flip(0)),
    "NumPy": lambda weight: weight.detach().numpy().__imul__(2),
    "other .data": lambda weight: setattr(weight, "data", weight.data.flip(0)),
    "made empty and set": lambda weight: weight.set_(weight.detach().clone() * 2),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("part", ["weight", "bias"])
@torch.no_grad()
def test_a_changed_output_projection_is_what_is_used(model: Florence2Model, change: str, part: str) -> None:
    x = hidden(model)
    before = model.logits(x)
    CHANGES[change](model.output_weight if part == "weight" else model.final_logits_bias)
    assert torch.allclose(model.logits(x), Florence2Model.logits(model, x), atol=1e-4)
    assert not torch.allclose(model.logits(x), before, atol=1e-2) or (part, change) in (
        ("bias", "by .data"),
        ("bias", "other .data"),
    )


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["q_proj", "k_proj", "v_proj"])
@torch.no_grad()
def test_a_changed_map_is_what_is_used(model: Florence2Model, change: str, name: str) -> None:
    attention = attentions(model)[0]
    CHANGES[change](getattr(attention, name).weight)
    together = joint_map(attention)
    assert (together is None) == (change in ("other .data", "made empty and set"))
    if together is not None:
        own = [attention.q_proj, attention.k_proj, attention.v_proj]
        assert torch.equal(together[0], torch.cat([each.weight for each in own]))
        assert torch.equal(together[1], torch.cat([each.bias for each in own]))


def test_a_replaced_parameter_or_map_is_found(model: Florence2Model) -> None:
    one, other, third = attentions(model)[:3]
    one.k_proj.weight = nn.Parameter(one.k_proj.weight.detach().clone())
    other.q_proj = nn.Sequential(other.q_proj)  # type: ignore[assignment]
    third.v_proj.bias = None  # type: ignore[assignment]
    assert joint_map(one) is joint_map(other) is joint_map(third) is None
    lay_out(model)  # the rest of the first still shares its memory
    assert joint_map(one) is None
    model.half()
    assert joint_map(one) is not None and joint_map(other) is joint_map(third) is None


@pytest.mark.parametrize("move", [lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.double().float()])
def test_a_converted_model_is_laid_out_again(model: Florence2Model, move: Callable[[Any], Any]) -> None:
    assert move(model) is model and is_laid_out(model)


def test_a_copy_keeps_its_values_and_steps_aside(model: Florence2Model) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), model.parameters(), strict=True))
        with torch.no_grad():
            assert torch.allclose(other.logits(hidden(model)), model.logits(hidden(model)), atol=1e-4)
            other.language_model.shared.weight.zero_()
            assert model.language_model.shared.weight.any()


def test_untied_projections(model: Florence2Model) -> None:
    shared = model.language_model.shared.weight
    model.untie_head(shared.detach().flip(0))
    with torch.no_grad():
        assert torch.allclose(model.logits(hidden(model)), Florence2Model.logits(model, hidden(model)), atol=1e-4)
    lay_out(model)
    assert is_laid_out(model) and torch.equal(model.output_weight, shared.flip(0))


def test_memory_that_parameters_share_stays_shared(plain: Florence2Model) -> None:
    """As ties do that somebody made by `.data`: one of the two would be left behind."""
    own, other = attentions(plain)[:2]
    own.q_proj.weight.data = other.q_proj.weight.data
    install(plain)
    assert own.q_proj.weight.data_ptr() == other.q_proj.weight.data_ptr()
    assert joint_map(own) is None and joint_map(attentions(plain)[2]) is not None


def test_a_saved_checkpoint_is_the_same(small_folder: Path, tmp_path: Path) -> None:
    f = load(small_folder)
    assert is_laid_out(f.model)
    f.save(tmp_path / "saved")
    again, first = load(tmp_path / "saved").model.state_dict(), f.model.state_dict()
    assert all(torch.equal(tensor, first[name]) for name, tensor in again.items())
    size = (tmp_path / "saved" / "model.safetensors").stat().st_size
    assert abs(size - (small_folder / "model.safetensors").stat().st_size) < 1 << 16
    torch.save(f.model.state_dict(), tmp_path / "state.pt")
    f.model.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert is_laid_out(f.model)


def test_it_can_be_trained(model: Florence2Model) -> None:
    """Parameters that are views have gradients and steps of their own."""
    attention = attentions(model)[0]
    optimiser = torch.optim.AdamW(attention.parameters(), lr=0.1)
    before = attention.k_proj.weight.detach().clone()
    attention.q_proj(torch.ones(1, 1, model.config.text.d_model)).sum().backward()
    optimiser.step()
    assert torch.equal(attention.k_proj.weight, before) and joint_map(attention) is not None


def test_a_cpu_keeps_its_tensors_where_they_are(plain: Florence2Model) -> None:
    availability._rehearsing.set(False)
    places = [parameter.data_ptr() for parameter in plain.parameters()]
    assert [parameter.data_ptr() for parameter in install(plain).float().parameters()] == places


@pytest.mark.parametrize("parts", ["vision", "encoder"])
def test_parts_that_are_missing_are_no_hindrance(parts: Parts, mini_folder: Path) -> None:
    assert load(mini_folder, parts=parts).model.half().dtype == torch.float16


@torch.no_grad()
def test_tensors_that_only_look_joined() -> None:
    whole = torch.arange(24.0).view(6, 4)
    parts = list(whole.split([2, 1, 3]))
    found = joined(parts)
    assert found is not None and torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
    assert joined([parts[1], parts[0], parts[2]]) is None and joined([parts[0], parts[2]]) is None
    assert joined([parts[0], None]) is None and joined([]) is None
    assert joined([whole[:2, :2], whole[2:, :2]]) is None
    assert padded(whole[:5], 6) is not None and padded(whole[:5], 7) is None and padded(whole.T, 4) is None


def test_gradients_and_uninstalled_models_take_the_plain_product(model: Florence2Model) -> None:
    assert project(hidden(model), model.output_weight, model.final_logits_bias[0]) is None
    model.logits(hidden(model)).sum().backward()
    assert model.output_weight.grad is not None
    with torch.no_grad():
        found = model.logits(hidden(model))
        assert torch.allclose(found, uninstall(model).logits(hidden(model)), atol=1e-4)


@pytest.mark.release
@pytest.mark.parametrize("beams", [2, 1])
def test_answers_are_the_same(mini: Florence2, beams: int) -> None:
    """With padded logits through the rules, the log-softmax and the search."""
    pytest.importorskip("triton")
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(1))
    expected = Florence2(uninstall(copy.deepcopy(mini.model)), mini.processor)
    f = Florence2(install(copy.deepcopy(mini.model)), mini.processor)
    assert is_laid_out(f.model)
    mine, theirs = (each.run("<OD>", image, max_new_tokens=4, num_beams=beams) for each in (f, expected))
    assert mine.token_ids == theirs.token_ids
    assert mine.token_logprobs == pytest.approx(theirs.token_logprobs, abs=1e-4)
