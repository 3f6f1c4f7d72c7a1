"""Naming intermediates: what is recorded, and that nothing changes."""

import torch

from florence2.model.florence2 import Florence2Model
from florence2.model.trace import NO_TRACE, Trace
from parity.cases import shapes


class Keep(Trace):
    """Keeps everything; replaces what `swaps` names."""

    def __init__(self, wanted: str = "", swaps: dict[str, torch.Tensor] | None = None):
        self.wanted, self.swaps = wanted, swaps or {}
        self.seen: dict[str, torch.Tensor] = {}

    def wants(self, name: str) -> bool:
        return bool(self.wanted) and self.wanted in name

    def enters(self, prefix: str) -> bool:
        return True

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.seen[name] = value
        return self.swaps.get(name, value)


def run(model: Florence2Model, trace: Trace) -> torch.Tensor:
    memory = model.encode(model.encode_image(torch.ones(1, 3, 64, 64), trace), torch.tensor([[0, 5, 2]]), trace=trace)
    return model.decode(torch.tensor([[2, 0, 9]]), memory, trace=trace)


def test_without_a_trace_nothing_happens() -> None:
    value = torch.ones(1)
    assert NO_TRACE("x", value) is value and NO_TRACE.at("x") is NO_TRACE


def test_names_are_module_paths_and_values_unchanged() -> None:
    torch.manual_seed(0)
    model = Florence2Model(shapes()[3].config).eval()
    keep = Keep()
    with torch.no_grad():
        assert torch.allclose(run(model, keep), run(model, NO_TRACE), rtol=1e-5, atol=1e-4)
    for name in (
        "pixel_values",
        "vision_tower.convs.0",
        "vision_tower.blocks.1.0.spatial_block.window_attn",
        "vision_tower.blocks.1.1.channel_block.channel_attn.weights",
        "multi_modal_projector",
        "encoder.layers.0.mlp",
        "decoder.layers.0.cross_attention",
        "logits",
    ):
        assert name in keep.seen, name
    assert not any(name.endswith("window_attn.weights") for name in keep.seen)


def test_attention_weights_on_request() -> None:
    model = Florence2Model(shapes()[3].config).eval()
    keep = Keep(wanted="weights")
    with torch.no_grad():
        plain, traced = run(model, NO_TRACE), run(model, keep)
    assert torch.allclose(plain, traced, atol=1e-4)
    assert keep.seen["decoder.layers.0.cross_attention.weights"].shape == (1, 4, 3, 65 + 3)
    assert keep.seen["encoder.layers.0.self_attention.weights"].shape == (1, 4, 68, 68)
    assert keep.seen["vision_tower.blocks.0.0.spatial_block.window_attn.weights"].shape[1:] == (3, 25, 25)


def test_what_a_trace_returns_is_what_the_run_goes_on_with() -> None:
    model = Florence2Model(shapes()[3].config).eval()
    with torch.no_grad():
        keep = Keep()
        run(model, keep)
        zero = torch.zeros_like(keep.seen["multi_modal_projector"])
        changed = run(model, Keep(swaps={"multi_modal_projector": zero}))
        memory = model.encode(zero, torch.tensor([[0, 5, 2]]))
        assert torch.allclose(changed, model.decode(torch.tensor([[2, 0, 9]]), memory), atol=1e-6)


def test_a_step_is_traced_like_a_whole_sequence() -> None:
    model = Florence2Model(shapes()[3].config).eval()
    keep = Keep(wanted="weights")
    with torch.no_grad():
        cache = model.start_cache(torch.randn(1, 6, 64), 2, 4)
        model.step(torch.tensor([2, 2]), cache, keep)
    assert keep.seen["decoder.layers.0.cross_attention.weights"].shape == (1, 4, 2, 6)
    assert keep.seen["decoder.layers.0"].shape == (2, 1, 64)
