"""Each kernel against its plain lines: by Triton's interpreter on a CPU, compiled where there is a CUDA device."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("triton")

from florence2.fast.cuda.kernels import availability
from florence2.fast.cuda.kernels.availability import rehearsal, why_no_kernel
from florence2.fast.cuda.kernels.decode_attention import attend_few
from florence2.fast.cuda.kernels.gelu import gelu_
from florence2.fast.cuda.kernels.join import join_add_, join_add_plain
from florence2.fast.cuda.kernels.norm import add_norm, add_norm_plain, add_norm_split, add_norm_split_plain
from florence2.model.attention import attend, gelu
from tests.release import keep

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# the interpreter cuts bfloat16 off where hardware rounds, so one unit in the last place; a sum that the plain line
# rounds and the kernel does not is another half
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}
DTYPES = pytest.mark.parametrize("dtype", TOLERANCES, ids=str)


@pytest.fixture(autouse=True)
def _rehearsal() -> Iterator[None]:
    with torch.inference_mode(), rehearsal():
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE, dtype)


def same(found: Tensor, expected: Tensor, scale: float = 1.0) -> bool:
    """Whether two tensors of one type are equal within its tolerance, computed from plain lines in double."""
    assert found.shape == expected.shape
    tolerance = TOLERANCES[found.dtype] * scale
    return torch.allclose(found.double(), expected.double(), atol=tolerance, rtol=tolerance)


def test_kernels_run_here() -> None:
    assert why_no_kernel(torch.device(DEVICE), torch.float32) is None
    assert why_no_kernel(torch.device(DEVICE), torch.float64) == "the weights are float64"


@pytest.mark.parametrize(
    ("capability", "words"),
    [((7, 5), None), ((7, 0), "the device has compute capability 7.0, and Triton needs 7.5"), ((6, 9), "6.9")],
)
def test_an_old_device_is_named(
    capability: tuple[int, int], words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(availability, "_capability", lambda device: capability)
    monkeypatch.setattr(availability, "_why_none_starts", lambda device: None)
    reason = why_no_kernel(torch.device("cuda"), torch.float32)
    assert reason is None if words is None else words in str(reason)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 1, 8), (3, 5, 24), (2, 7, 65), (1, 1030)], ids=str)
def test_add_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, y = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1) + 2
    weight, bias = randn(shape[-1], dtype=dtype, seed=2), randn(shape[-1], dtype=dtype, seed=3)
    total, normed = add_norm(x, y, weight, bias, 1e-5)
    assert total is not None and total.dtype == normed.dtype == dtype
    exact = add_norm_plain(x.double(), y.double(), weight.double(), bias.double(), 1e-5)
    assert same(total, exact[0]) and same(normed, exact[1])
    assert add_norm(x, y, weight, bias, 1e-5, keep=False)[0] is None


def test_add_norm_reads_layouts_as_they_are() -> None:
    x, y, weight, bias = randn(3, 4, 6), randn(6, 4, 3).permute(2, 1, 0), randn(6), randn(6, seed=1)
    assert same(add_norm(x, y, weight, bias, 0.5)[1], add_norm_plain(x, y, weight, bias, 0.5)[1])


def test_the_residual_stream_may_be_large() -> None:
    """What float16 cannot hold squared: the statistics are float32."""
    x, y = randn(2, 40, dtype=torch.float16) * 3000, randn(2, 40, dtype=torch.float16, seed=1)
    weight, bias = randn(40, dtype=torch.float16), randn(40, dtype=torch.float16, seed=1)
    exact = add_norm_plain(x.double(), y.double(), weight.double(), bias.double(), 1e-5)[1]
    assert same(add_norm(x, y, weight, bias, 1e-5)[1], exact)


GRIDS = pytest.mark.parametrize(
    ("shape", "window"), [((1, 4, 6, 8), 2), ((2, 5, 7, 24), 3), ((1, 3, 2, 10), 4), ((3, 7, 4, 33), 7)], ids=str
)


@DTYPES
@GRIDS
def test_add_norm_split(shape: tuple[int, ...], window: int, dtype: torch.dtype) -> None:
    x, y, C = randn(*shape, dtype=dtype), randn(*shape, dtype=dtype, seed=1), shape[-1]
    weight, bias = randn(C, dtype=dtype, seed=2), randn(C, dtype=dtype, seed=3)
    total, windows = add_norm_split(x, y, weight, bias, 1e-5, window)
    exact = add_norm_split_plain(x.double(), y.double(), weight.double(), bias.double(), 1e-5, window)
    assert same(total, exact[0]) and same(windows, exact[1])
    assert torch.equal(windows == 0, exact[1].to(dtype) == 0)  # padding is zero, not the bias


@DTYPES
@GRIDS
def test_join_add(shape: tuple[int, ...], window: int, dtype: torch.dtype) -> None:
    B, H, W, C = shape
    windows = randn(B * -(-H // window) * -(-W // window), window * window, C, dtype=dtype)
    x = randn(*shape, dtype=dtype, seed=1)
    exact = join_add_plain(x.double(), windows.double(), window)
    assert join_add_(x, windows, window) is x and same(x, exact)


@DTYPES
@pytest.mark.parametrize("shape", [(1,), (3, 1024), (2, 5, 411)], ids=str)
def test_gelu(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = randn(*shape, dtype=dtype) * 4
    exact = gelu(x.double())
    assert gelu_(x) is x and same(x, exact)


def split_heads(B: int, S: int, heads: int, d: int, dtype: torch.dtype, seed: int) -> Tensor:
    """(B, heads, S, d), strided as after a projection."""
    return randn(B, S, heads * d, dtype=dtype, seed=seed).view(B, S, heads, d).transpose(1, 2)


@DTYPES
@pytest.mark.parametrize(
    ("B", "heads", "K", "S", "d"),
    keep([1, 3], [(1, 1, 1, 1, 8), (2, 3, 3, 37, 16), (2, 2, 5, 150, 24), (1, 2, 16, 70, 64)]),
)
@pytest.mark.parametrize("masked", ["no", "keys", "queries"])
def test_decode_attention(B: int, heads: int, K: int, S: int, d: int, masked: str, dtype: torch.dtype) -> None:
    query, key, value = (split_heads(B, length, heads, d, dtype, i) for i, length in enumerate((K, S, S)))
    mask = None
    if masked != "no":
        mask = randn(B, 1, 1 if masked == "keys" else K, S, seed=7) > 0
        mask[..., 0] = True
    found = attend_few(query, key, value, mask)
    assert found.dtype == dtype and found.transpose(1, 2).is_contiguous()
    exact = attend(query.double(), key.double(), value.double(), mask, attention="eager")
    assert same(found, exact, 2)


def test_decode_attention_over_views_of_larger_buffers() -> None:
    keys, values = randn(3, 2, 50, 16), randn(3, 2, 50, 16, seed=1)
    ancestry = randn(3, 4, 50, seed=2) > 0
    ancestry[:, :, 0] = True
    query, mask = randn(2, 2, 4, 16), ancestry[:2, None, :, :30]
    found = attend_few(query, keys[:2, :, :30], values[:2, :, :30], mask)
    assert same(found, F.scaled_dot_product_attention(query, keys[:2, :, :30], values[:2, :, :30], mask), 2)


def test_slots_that_no_query_sees_may_hold_anything() -> None:
    query, key, value = randn(1, 2, 3, 8), randn(1, 2, 40, 8), randn(1, 2, 40, 8, seed=1)
    mask = torch.ones(1, 1, 3, 40, dtype=torch.bool, device=DEVICE)
    mask[..., 7:] = False
    expected = attend(query, key[:, :, :7], value[:, :, :7])
    key[:, :, 7:], value[:, :, 7:] = float("nan"), float("inf")
    assert same(attend_few(query, key, value, mask), expected, 2)
    mask[:, :, 1] = False
    assert torch.equal(attend_few(query, key, value, mask)[:, :, 1], torch.zeros(1, 2, 8, device=DEVICE))


def test_large_scores_do_not_overflow() -> None:
    query, key, value = randn(1, 1, 2, 8) * 100, randn(1, 1, 200, 8) * 100, randn(1, 1, 200, 8, seed=1)
    found = attend_few(query, key, value)
    assert torch.allclose(found, attend(query, key, value, attention="eager"), atol=1e-4)
