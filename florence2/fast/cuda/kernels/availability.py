"""Where a kernel can run: on a CUDA device, or by Triton's interpreter on a CPU, for tests.

Triton decides between compiler and interpreter when it is imported, by the variable TRITON_INTERPRET.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import cache

import torch
from torch import Tensor, nn

from florence2.fast.packed import is_plain
from florence2.fast.unchanged import find_mode

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_OLDEST = (7, 5)  # the compute capability that Triton 3 needs

_rehearsing: ContextVar[bool] = ContextVar("florence2_rehearsing", default=False)


@contextlib.contextmanager
def rehearsal() -> Iterator[None]:
    """Let CPU tensors take the ways of a CUDA device inside the block, in this thread or task; for tests.

    Kernels then run by Triton's interpreter, a thousand times slower: the process needs TRITON_INTERPRET=1 before it
    imports Triton.
    """
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def why_not_cuda(device: torch.device) -> str | None:
    """Return in words why the ways of a CUDA device are not taken on `device`; None if they are."""
    # torch.compile cannot read a context variable
    if device.type == "cuda" or (device.type == "cpu" and not torch.compiler.is_compiling() and _rehearsing.get()):
        return None
    return f"the model is on {device.type}"


def why_no_kernel(device: torch.device, dtype: torch.dtype) -> str | None:
    """Return in words why no kernel can run on tensors of this kind; None if kernels can."""
    reason = why_not_cuda(device) or find_mode()  # the cheap question first: a CPU asks at every step
    if reason is not None:
        return reason
    if not _has_triton():
        return "the package triton is missing"
    if dtype not in DTYPES:
        return f"the weights are {str(dtype).removeprefix('torch.')}"
    if device.type == "cpu":
        return None if _interprets() else "Triton was imported without TRITON_INTERPRET=1"
    if not torch.cuda.is_available():
        return "torch finds no CUDA device"
    capability = _capability(device)
    if capability < _OLDEST:
        return f"the device has compute capability {capability[0]}.{capability[1]}, and Triton needs 7.5"
    return _why_none_starts(device)


def are_plain(*tensors: Tensor | None) -> bool:
    """Return whether a kernel may read these tensors by their addresses: torch's own, of one type, on one device."""
    first = tensors[0]
    return first is not None and all(
        tensor is not None and is_plain(tensor) and tensor.dtype == first.dtype and tensor.device == first.device
        for tensor in tensors
    )


def why_no_norm(norms: Sequence[nn.LayerNorm], dtype: torch.dtype) -> str | None:
    """Return in words why a kernel cannot compute these LayerNorms of one model; None if it can."""
    tensors = [tensor for norm in norms for tensor in (norm.weight, norm.bias)]
    if not are_plain(*tensors) or norms[0].weight.dtype != dtype:
        return "a LayerNorm has no weights, or weights of another type"
    one_axis = all(len(norm.normalized_shape) == 1 and norm.weight.is_contiguous() for norm in norms)
    return None if one_axis else "a LayerNorm has several axes"


def on_device_of(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a block inside which kernels start on the device of `tensor`: Triton takes the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


@cache
def _interprets() -> bool:
    import triton

    return bool(triton.knobs.runtime.interpret)


@cache
def _why_none_starts(device: torch.device) -> str | None:
    """Return in words why the smallest kernel does not run: Triton needs a C compiler, and a folder to write to."""
    from florence2.fast.cuda.kernels.gelu import gelu_

    try:
        gelu_(torch.zeros(1, device=device))
    except Exception as error:  # noqa: BLE001  of Triton's, of many classes
        return f"Triton fails here ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)
