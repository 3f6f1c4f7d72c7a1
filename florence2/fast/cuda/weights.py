"""Weights laid out at load so that one product does the work of several, without a second copy of any weight.

`lay_out` moves the weights of q, k and v of an attention next to each other, and the output projection to the beginning
of a storage with room for a multiple of 64 rows; the parameters become views of these storages. So the joined weight
is the parameters' own memory: whatever changes one changes the other, and no copy can be out of date. A parameter
that was given other memory since is found by its address, and the plain products are computed.

51,289 columns are not a multiple of 8, for which cuBLAS takes unaligned kernels: on an H200 70 of a step's 720 us, and
254 us with 64 images. How much this gains was not measured yet.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.fast.cuda.kernels.availability import DTYPES, why_not_cuda
from florence2.fast.packed import is_plain
from florence2.fast.unchanged import find_mode
from florence2.model.absent import find_absent
from florence2.model.bart import Attention, LanguageModel
from florence2.model.florence2 import Florence2Model

_MULTIPLE = 64  # columns: what the widest kernels of cuBLAS compute at a time
_NEVER = float("-inf")
_WIDENS = hasattr(torch.ops.aten.mm, "dtype")  # torch 2.8 and later


def lay_out(model: nn.Module) -> None:
    """Move the weights of `model` that lie on a CUDA device to where one product can read several of them.

    Values, shapes, names and the parameters themselves stay; tensors that share memory with another are left alone.
    """
    owners = Counter(_storage(tensor) for tensor in _distinct(model))
    with torch.inference_mode(False), torch.no_grad():
        for tensors in _joint_weights(model):
            if all(_may_move(tensor, owners) for tensor in tensors) and joined(tensors) is None:
                _lay_together(tensors)
        for tensor, rows, fill in _output_weights(model):
            if _may_move(tensor, owners) and padded(rows, _round_up(len(rows))) is None:
                room = rows.new_full((_round_up(len(rows)), *rows.shape[1:]), fill)
                room[: len(rows)] = rows
                tensor.data = room[: len(rows)].view(tensor.shape)


def joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Return tensors that lie one after another as one, a view of (all rows, ...); None where they do not."""
    tensors = [part.detach() for part in parts if part is not None and is_plain(part) and part.is_contiguous()]
    if not tensors or len(tensors) < len(parts) or not all(_follows(*pair) for pair in pairwise(tensors)):
        return None
    first = tensors[0]
    return first.as_strided((sum(map(len, tensors)), *first.shape[1:]), first.stride(), first.storage_offset())


def padded(tensor: Tensor, rows: int) -> Tensor | None:
    """Return a view of `rows` rows that begins with those of `tensor`; None where its storage has no room for them."""
    if not is_plain(tensor) or not tensor.is_contiguous():
        return None
    first = tensor.detach()
    end = first.storage_offset() + rows * first.stride(0)
    if first.untyped_storage().nbytes() < end * first.element_size():
        return None
    return first.as_strided((rows, *first.shape[1:]), first.stride(), first.storage_offset())


def project(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor | None:
    """Return hidden (..., D) times weight (V, D) plus bias (V,), in float32; None where they are not laid out.

    The result is a view of a wider product: whatever lies in the padding makes columns that are cut off. Of float16 and
    bfloat16 the sums stay float32, as cuBLAS computes them: rounded to bfloat16, logits from 16 to 32 are multiples of
    1/8, and many are equal that were not. Computed on a CPU, 485 of nano's 578 answers on 40 scenes in bfloat16 are
    those of float32 this way, 363 with rounded logits.
    """
    if why_not_cuda(hidden.device) is not None or find_mode() is not None or not is_plain(hidden):
        return None
    if hidden.dtype not in DTYPES or not hidden.dtype == weight.dtype == bias.dtype:
        return None
    columns = _round_up(len(weight))
    wide, wide_bias = padded(weight, columns), padded(bias, columns)
    if wide is None or wide_bias is None:
        return None
    if hidden.dtype == torch.float32 or not _WIDENS:
        logits = F.linear(hidden, wide, wide_bias).float()
    else:
        logits = _widening_product(hidden, wide).add_(wide_bias)
    return logits[..., : len(weight)]


def _widening_product(x: Tensor, weight: Tensor) -> Tensor:
    """Return x (..., D) times weight (V, D) of 16 bits as float32 (..., V)."""
    if not x.is_cuda:  # a rehearsal; this overload exists on CUDA devices alone
        return F.linear(x.float(), weight.float())
    product = torch.mm(x.flatten(0, -2), weight.t(), out_dtype=torch.float32)
    return product.view(*x.shape[:-1], len(weight))


def why_not_padded(model: Florence2Model) -> str | None:
    """Return in words why the output projection is not padded; None if it is."""
    weight, bias = model.output_weight, model.final_logits_bias[0]
    if any(padded(tensor, _round_up(len(weight))) is None for tensor in (weight, bias)):
        return "the output projection was given other memory since the model was loaded"
    return None


def joint_map(attention: Attention) -> tuple[Tensor, Tensor] | None:
    """Return weight and bias of q, k and v as one linear map, views of theirs; None where they lie apart."""
    maps = _maps(attention)
    weight, bias = joined([each.weight for each in maps]), joined([each.bias for each in maps])
    return None if weight is None or bias is None else (weight, bias)


def _maps(attention: Attention) -> list[nn.Linear]:
    """Return the maps of queries, keys and values; none if they are not linear maps, which somebody put there."""
    maps = [attention.q_proj, attention.k_proj, attention.v_proj]
    return maps if all(isinstance(each, nn.Linear) for each in maps) else []


def _joint_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    for part in model.modules():
        maps = _maps(part) if isinstance(part, Attention) else []
        if maps and all(each.bias is not None for each in maps):
            yield [each.weight for each in maps]
            yield [each.bias for each in maps]


def _output_weights(model: nn.Module) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield weight and bias of the output projection: the tensor, its rows (V, ...), and the values that pad them."""
    if isinstance(model, Florence2Model) and find_absent(model) is None and type(model.language_model) is LanguageModel:
        weight, bias = model.output_weight, model.final_logits_bias
        yield weight, weight.detach(), 0.0
        yield bias, bias.detach()[0], _NEVER


def _distinct(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if is_plain(tensor) else 0


def _may_move(tensor: Tensor, owners: Counter[int]) -> bool:
    """Return whether a tensor is alone in its memory, on a device where moving it gains something."""
    if not is_plain(tensor) or tensor.is_inference() or why_not_cuda(tensor.device) is not None:
        return False
    return owners[_storage(tensor)] == 1


def _follows(one: Tensor, other: Tensor) -> bool:
    return (
        other.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
        and (other.dtype, other.device, other.shape[1:]) == (one.dtype, one.device, one.shape[1:])
        and other.storage_offset() == one.storage_offset() + one.numel()
    )


def _lay_together(tensors: Sequence[Tensor]) -> None:
    if len({(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}) > 1:
        return
    together = torch.cat([tensor.detach() for tensor in tensors])
    for tensor, view in zip(tensors, torch.split(together, [len(tensor) for tensor in tensors]), strict=True):
        tensor.data = view


def _round_up(rows: int) -> int:
    return -(-rows // _MULTIPLE) * _MULTIPLE
