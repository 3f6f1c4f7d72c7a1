"""captum reads, attributes to and ablates an attention module and a decoder layer through the model's `forward`."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerActivation, LayerFeatureAblation, LayerIntegratedGradients
from torch import Tensor

from florence2 import Florence2
from florence2.tracing.names import module_of
from florence2.tracing.patches import replace, zero
from tests.interop.conftest import Call, logits_patched, value_of

NAMES = ("decoder.layers.0.cross_attention", "decoder.layers.1", "encoder.layers.0.self_attention")


def module(f: Florence2, name: str) -> Any:
    path = module_of(name)
    assert path is not None
    return f.model.get_submodule(path)


def score(f: Florence2) -> Callable[..., Tensor]:
    """The logit of one id at the last place, (B,)."""

    def of(pixel_values: Tensor, input_ids: Tensor, decoder_input_ids: Tensor) -> Tensor:
        logits: Tensor = f.model(pixel_values, input_ids, decoder_input_ids)
        return logits[:, -1, 905]

    return of


@pytest.mark.parametrize("name", NAMES)
def test_activations_are_those_of_a_trace(f: Florence2, call: Call, name: str) -> None:
    seen = LayerActivation(f.model, module(f, name)).attribute(call[0], additional_forward_args=call[1:])
    assert torch.allclose(seen, value_of(f, call, name), atol=1e-5)


@pytest.mark.parametrize("name", NAMES[:2])
def test_ablation_is_that_of_a_patch(f: Florence2, call: Call, name: str) -> None:
    """A layer's whole output set to zero: what the score loses."""
    ablation, layer = LayerFeatureAblation(score(f), module(f, name)), module(f, name)
    one_feature = torch.zeros_like(value_of(f, call, name), dtype=torch.long)
    lost = ablation.attribute(call[0], layer_baselines=0, additional_forward_args=call[1:], layer_mask=one_feature)
    expected = logits_patched(f, call, {})[0, -1, 905] - logits_patched(f, call, {name: zero()})[0, -1, 905]
    assert abs(float(expected)) > 1e-3 and torch.allclose(lost, expected.expand_as(lost), atol=1e-4)
    assert not layer._forward_hooks and not layer._forward_pre_hooks


def test_integrated_gradients_are_complete(f: Florence2, call: Call) -> None:
    """Over the layer's values they sum to the change of the score when these values alone are a black image's."""
    name = NAMES[0]
    black: Call = (torch.zeros_like(call[0]), *call[1:])
    attributions = LayerIntegratedGradients(score(f), module(f, name)).attribute(
        call[0], baselines=black[0], additional_forward_args=call[1:], n_steps=64, internal_batch_size=1
    )
    there, without = (
        logits_patched(f, call, {name: replace(value_of(f, one, name))})[0, -1, 905] for one in (call, black)
    )
    assert attributions.shape == value_of(f, call, name).shape
    assert abs(float(there - without)) > 1e-3
    assert float(attributions.sum()) == pytest.approx(float(there - without), rel=0.02, abs=1e-4)
