"""Tensors in weight files: their headers, and their values one after another.

Reads safetensors, sharded sets with an index, and pickles (`.bin`). Pickles are opened only when the caller allows it:
looked through first, then read with `weights_only=True`, so that no code in them runs. Nothing here knows Florence-2.
"""

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from florence2.checkpoints.checks.pickles import UnsafePickle, check_pickle
from florence2.checkpoints.files import cannot_write, find_weight_files, refuse_pointer, written_whole
from florence2.errors import MAX_LISTED, CheckpointError, clip, listing

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_WHOLE = {
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types of whole numbers, which no tensor of Florence-2 has, but buffers of added modules may."""
_MAPPED_BYTES = 64 << 20  # how much of a file is mapped at once while reading, which bounds the RAM beyond the weights


@dataclass(frozen=True)
class TensorInfo:
    """The header of one tensor; `dtype` is None when its values are of a type that is not supported, or not plain."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class WeightFiles:
    """One checkpoint's weight files; `pickled` ones are `.bin`."""

    paths: tuple[Path, ...]
    pickled: bool

    def read_headers(self, whole_numbers: bool = False) -> dict[str, TensorInfo]:
        """Read the header of every tensor, by name, without its values.

        Raises CheckpointError listing every file that is missing, truncated or malformed, every tensor that does not
        hold plain floating-point values (or `whole_numbers`, where these are allowed), and every name that occurs in
        two files.
        """
        headers: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for path in self.paths:
            try:
                stored = _pickle_headers(path) if self.pickled else _safetensors_headers(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            problems += [
                f"{path.name}: {name} does not hold plain floating-point values"
                for name, info in stored.items()
                if info.dtype is None or not (whole_numbers or info.dtype.is_floating_point)
            ]
            problems += [f"{path.name}: {name} occurs in another file too" for name in stored if name in headers]
            headers |= stored
        if problems:
            raise CheckpointError(listing(problems, "\n", MAX_LISTED))
        return headers

    def read(self, wanted: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor with its name, or only the `wanted` ones; the values of others are not read.

        Each tensor is valid only until the next is requested, so copy what you keep. A pickle in the format before
        torch 1.6 is always read completely.
        """
        for path in self.paths:
            if self.pickled:
                yield from ((n, tensor) for n, tensor in _load_pickle(path).items() if wanted is None or n in wanted)
            else:
                yield from _read_safetensors(path, wanted)

    def read_named(self, names: Iterable[str]) -> Iterator[Tensor]:
        """Yield the tensors of `names`, in that order; each is valid only until the next is requested."""
        if self.pickled:
            held = {name: tensor for path in self.paths for name, tensor in _load_pickle(path).items()}
            yield from (held[name] for name in names)
            return
        names = list(names)
        if len(self.paths) == 1:  # headers take longer to read than one tensor, and a shard has hundreds
            files = dict.fromkeys(names, self.paths[0])
        else:
            files = {name: path for path in self.paths for name in _safetensors_headers(path)}
        for path, group in groupby(names, files.__getitem__):
            yield from (tensor for _, tensor in _read_in_order(path, list(group)))


def find_weights(path: Path, allow_pickle: bool = False) -> WeightFiles:
    """Find the weight files that `path` means, as `find_weight_files` does. Only `allow_pickle` accepts a `.bin`."""
    return WeightFiles(*find_weight_files(path, allow_pickle))


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as one file, whole or not at all. Raises OutputError when it cannot be written."""
    with written_whole(path) as draft:
        try:
            # transformers reads no file without "format" in its metadata
            save_file(_apart(tensors), draft, metadata={"format": "pt"})
        except SafetensorError as error:  # of a full disk too: it is not an OSError
            raise cannot_write(path, str(error)) from None


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return contiguous tensors that share no memory, which safetensors would refuse."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        whole = tensor.contiguous()
        place = whole.untyped_storage().data_ptr()
        apart[name] = whole.clone() if place in seen else whole
        seen.add(place)
    return apart


def _safetensors_headers(path: Path) -> dict[str, TensorInfo]:
    with _open_safetensors(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
        types = _DTYPES | _WHOLE
        return {name: TensorInfo(tuple(v.get_shape()), types.get(v.get_dtype())) for name, v in views.items()}


def _read_safetensors(path: Path, wanted: Container[str] | None) -> Iterator[tuple[str, Tensor]]:
    with _open_safetensors(path) as file:
        names = [name for name in file.keys() if wanted is None or name in wanted]  # noqa: SIM118
    yield from _read_in_order(path, names)


def _read_in_order(path: Path, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    while names:
        taken, mapped = 0, 0
        # Opening again releases the pages read so far; otherwise they would add up to the size of the file.
        with _open_safetensors(path) as file:
            while taken < len(names) and mapped < _MAPPED_BYTES:
                tensor = file.get_tensor(names[taken])
                yield names[taken], tensor
                taken, mapped = taken + 1, mapped + tensor.nbytes
                del tensor
        names = names[taken:]


def _open_safetensors(path: Path) -> safe_open:
    refuse_pointer(path)
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or not a safetensors file: {clip(error)}.") from None


def _pickle_headers(path: Path) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype if _is_plain(tensor) else None)
        for name, tensor in _load_pickle(path).items()
    }


def _is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor has a known type and stores each value, which an expanded or sparse one does not."""
    if not is_storable(tensor.dtype) or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.nbytes


def _load_pickle(path: Path) -> dict[str, Tensor]:
    refuse_pointer(path)
    try:
        check_pickle(path)
        loaded = _unpickle(path)
    except Exception as error:  # noqa: BLE001  a malformed or malicious pickle can make the reader raise anything
        reason = str(error) if isinstance(error, UnsafePickle) else type(error).__name__
        raise CheckpointError(
            f"{path} cannot be read as a pickle of tensors alone ({reason}): it is damaged, or holds other objects, "
            "which are never loaded here."
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise CheckpointError(f"{path} must be a flat dict of tensors, as torch.save writes a state_dict.")
    return {str(name): tensor for name, tensor in loaded.items()}


def _unpickle(path: Path) -> object:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error):
            raise
        return torch.load(path, map_location="cpu", weights_only=True)  # the format before torch 1.6 cannot be mapped


def is_storable(dtype: torch.dtype) -> bool:
    """Return whether a file can hold values of a type."""
    return dtype in _DTYPES.values() or dtype in _WHOLE.values()


def is_finite(tensor: Tensor) -> bool:
    """Return whether every value is finite, in one pass without a temporary: the extremes show NaN and infinities."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    low, high = torch.aminmax(tensor)
    return bool(torch.isfinite(low) & torch.isfinite(high))


def equals(loaded: Tensor, stored: Tensor, rows: int = 4096) -> bool:
    """Return whether `stored`, converted, equals `loaded`; by parts, because the token embedding is the largest."""
    return loaded.shape == stored.shape and all(
        torch.equal(loaded[i : i + rows], stored[i : i + rows].to(loaded)) for i in range(0, len(stored), rows)
    )
