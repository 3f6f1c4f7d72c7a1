"""nnsight reads and changes an attention module and a decoder layer through the model's `forward`."""

import torch
from nnsight import NNsight

from florence2 import Florence2, explain_path
from florence2.tracing.patches import scale, zero
from tests.interop.conftest import Call, logits_patched, value_of


def test_outputs_are_those_of_a_trace(f: Florence2, call: Call) -> None:
    seeing = NNsight(f.model)
    with torch.no_grad(), seeing.trace(*call):
        attention = seeing.language_model.decoder.layers[0].encoder_attn.output.save()
        layer = seeing.language_model.decoder.layers[1].output.save()
        logits = seeing.output.save()
    assert torch.equal(attention, value_of(f, call, "decoder.layers.0.cross_attention"))
    assert torch.equal(layer, value_of(f, call, "decoder.layers.1"))
    assert torch.equal(logits, logits_patched(f, call, {}))


def test_an_attention_module_is_changed(f: Florence2, call: Call) -> None:
    seeing = NNsight(f.model)
    with torch.no_grad(), seeing.trace(*call):
        seeing.language_model.decoder.layers[0].encoder_attn.output[:] = 0
        logits = seeing.output.save()
    assert torch.allclose(logits, logits_patched(f, call, {"decoder.layers.0.cross_attention": zero()}), atol=1e-5)
    assert not torch.allclose(logits, logits_patched(f, call, {}), atol=1e-3)


def test_a_decoder_layer_is_changed(f: Florence2, call: Call) -> None:
    seeing = NNsight(f.model)
    with torch.no_grad(), seeing.trace(*call):
        layer = seeing.language_model.decoder.layers[1]
        layer.output = layer.output * 0.5
        logits = seeing.output.save()
    assert torch.allclose(logits, logits_patched(f, call, {"decoder.layers.1": scale(0.5)}), atol=1e-5)
    assert not torch.allclose(logits, logits_patched(f, call, {}), atol=1e-3)


def test_its_wrappers_are_seen_and_the_answer_stays(f: Florence2, mini: Florence2) -> None:
    """nnsight replaces the `forward` of every module: the faster ways step aside, the tokens stay."""
    image = torch.zeros(3, 40, 60, dtype=torch.uint8).permute(1, 2, 0).numpy()
    NNsight(f.model)
    assert "has a replaced method, forward" in explain_path(f)
    few = {"num_beams": 2, "max_new_tokens": 12}
    assert f.run("<OD>", image, **few).token_ids == mini.run("<OD>", image, **few).token_ids
