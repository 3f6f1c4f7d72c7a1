"""torch's kernel and the written-out form are the same thing."""

import pytest
import torch

from florence2.model.attention import attend
from florence2.model.trace import Trace


@pytest.mark.parametrize("masking", ["none", "causal", "padding"])
def test_both_kinds_agree(masking: str) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, 3, 7, 8, dtype=torch.float64) for _ in range(3))
    mask = torch.rand(2, 1, 1, 7) > 0.3 if masking == "padding" else None
    if mask is not None:
        mask[..., 0] = True
    fused = attend(query, key, value, mask, causal=masking == "causal")
    written = attend(query, key, value, mask, causal=masking == "causal", attention="eager")
    assert torch.allclose(fused, written, atol=1e-12)


def test_by_hand() -> None:
    """One query (1, 0) of two dimensions over keys (1, 0) and (0, 0): scores 1/sqrt 2 and 0, so weights
    e^0.70711 / (1 + e^0.70711) = 0.66976 and 0.33024; values 10 and 20 mix to 13.3024."""
    query = torch.tensor([[[[1.0, 0.0]]]])
    key = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    value = torch.tensor([[[[10.0, 0.0], [20.0, 0.0]]]])
    for kind in ("sdpa", "eager"):
        assert attend(query, key, value, attention=kind)[0, 0, 0, 0].item() == pytest.approx(13.3024, abs=1e-3)  # type: ignore[arg-type]


def test_masked_keys_have_no_part() -> None:
    torch.manual_seed(1)
    query, key, value = (torch.randn(1, 1, 4, 2) for _ in range(3))
    mask = torch.tensor([[[[True, True, False, False]]]])
    for kind in ("sdpa", "eager"):
        full = attend(query, key, value, mask, attention=kind)  # type: ignore[arg-type]
        short = attend(query, key[:, :, :2], value[:, :, :2], attention=kind)  # type: ignore[arg-type]
        assert torch.allclose(full, short, atol=1e-6)


class Recorder(Trace):
    def __init__(self, wanted: bool):
        self.wanted = wanted
        self.seen: dict[str, torch.Tensor] = {}

    def wants(self, name: str) -> bool:
        return self.wanted

    def enters(self, prefix: str) -> bool:
        return self.wanted

    def __call__(self, name: str, value: torch.Tensor) -> torch.Tensor:
        self.seen[name] = value
        return value


def test_weights_are_computed_only_when_wanted() -> None:
    query, key, value = (torch.randn(1, 2, 3, 4) for _ in range(3))
    idle, curious = Recorder(False), Recorder(True)
    plain = attend(query, key, value, trace=idle)
    traced = attend(query, key, value, trace=curious)
    assert set(idle.seen) == {"heads"} and curious.seen["weights"].shape == (1, 2, 3, 3)
    assert torch.allclose(curious.seen["weights"].sum(-1), torch.ones(1, 2, 3)) and torch.allclose(
        plain, traced, atol=1e-6
    )
