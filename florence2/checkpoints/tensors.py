"""Weight files: which ones a path means, what tensors they hold, and the tensors one after another.

Knows safetensors, sharded sets with an index, and pickles (`.bin`), which are opened only when the caller allows it
and then with `weights_only=True`, so that no code in them runs. Nothing here knows Florence-2.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from florence2.checkpoints.files import read_json, written_whole
from florence2.errors import CheckpointError, ConfigError

SAFETENSORS = "model.safetensors"
PICKLE = "pytorch_model.bin"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_MAPPED_BYTES = 64 << 20  # how much of a file is mapped at once while reading: bounds the memory beyond the weights


@dataclass(frozen=True)
class TensorInfo:
    """What a header says of one tensor; `dtype` is None when it is not one of the floating-point types."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class WeightFiles:
    """One checkpoint's weight files; `pickled` ones are `.bin`."""

    paths: tuple[Path, ...]
    pickled: bool

    def read_headers(self) -> dict[str, TensorInfo]:
        """Every tensor by its name, without reading its values.

        Raises CheckpointError, listing everything, for files that are absent, truncated or malformed, tensors that
        do not hold plain floating-point values, and names that occur in two files.
        """
        headers: dict[str, TensorInfo] = {}
        problems: list[str] = []
        for path in self.paths:
            try:
                found = _pickle_headers(path) if self.pickled else _safetensors_headers(path)
            except CheckpointError as error:
                problems.append(str(error))
                continue
            problems += [
                f"{path.name}: {name} does not hold plain floating-point values"
                for name, info in found.items()
                if not info.dtype
            ]
            problems += [f"{path.name}: {name} occurs in another file too" for name in found if name in headers]
            headers |= found
        if problems:
            raise CheckpointError("\n".join(problems))
        return headers

    def read(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor, one after another; each is only valid until the next is asked for. Copy what you keep."""
        for path in self.paths:
            yield from _load_pickle(path).items() if self.pickled else _read_safetensors(path)

    def read_named(self, names: Iterable[str]) -> Iterator[Tensor]:
        """The tensors of `names`, in that order; each is only valid until the next is asked for."""
        if self.pickled:
            held = {name: tensor for path in self.paths for name, tensor in _load_pickle(path).items()}
            yield from (held[name] for name in names)
            return
        homes = {name: path for path in self.paths for name in _safetensors_headers(path)}
        for name in names:
            with _open_safetensors(homes[name]) as file:  # anew for each, which lets go of the last one's pages
                yield file.get_tensor(name)


def find_weights(path: Path, allow_pickle: bool = False) -> WeightFiles:
    """The weight files that `path` means: a folder, one weight file, or the index of a sharded set.

    In a folder, `model.safetensors` goes before an index, and that before the only other `.safetensors`. A `.bin` is
    taken when `path` names it, or, in a folder without safetensors, when `allow_pickle` is set.
    Raises CheckpointError with the remedy when there is nothing to read.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _read_index(path)
        return WeightFiles((path,), pickled=path.suffix in (".bin", ".pt", ".pth"))
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder, a weight file, or an index of shards.")
    for name in (SAFETENSORS, f"{SAFETENSORS}.index.json"):
        if (path / name).is_file():
            return find_weights(path / name)
    others = sorted(path.glob("*.safetensors"))
    if len(others) == 1:
        return WeightFiles((others[0],), pickled=False)
    if others:
        raise CheckpointError(
            f"{path} holds several weight files and no index: {', '.join(other.name for other in others)}; name one."
        )
    for name in (PICKLE, f"{PICKLE}.index.json"):
        if (path / name).is_file() and not allow_pickle:
            raise CheckpointError(
                f"{path} holds its weights only as a pickle, {name}. Make safetensors of it with "
                f"`florence2 convert {path / name} OUT`, or allow it with allow_pickle=True."
            )
        if (path / name).is_file():
            return find_weights(path / name)
    raise CheckpointError(f"{path} holds no weights: no {SAFETENSORS}, no index of one, no {PICKLE}.")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write `tensors` as one file, whole or not at all."""
    with written_whole(path) as draft:
        # "format" is what transformers wants to see before it reads the file
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, draft, metadata={"format": "pt"})


def _read_index(path: Path) -> WeightFiles:
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{path} points outside its folder: {', '.join(outside)}.")
    missing = [shard for shard in shards if len(shard) > 255 or not (path.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{path} lists shards that are not there: {', '.join(missing)}.")
    return WeightFiles(tuple(path.parent / shard for shard in shards), pickled=not path.name.startswith(SAFETENSORS))


def _safetensors_headers(path: Path) -> dict[str, TensorInfo]:
    with _open_safetensors(path) as file:
        views = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no mapping)
        return {name: TensorInfo(tuple(v.get_shape()), _DTYPES.get(v.get_dtype())) for name, v in views.items()}


def _read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with _open_safetensors(path) as file:
        names: Sequence[str] = list(file.keys())
    while names:
        taken, mapped = 0, 0
        # Opening again lets go of the pages read so far; without it they would add up to the size of the file.
        with _open_safetensors(path) as file:
            while taken < len(names) and mapped < _MAPPED_BYTES:
                tensor = file.get_tensor(names[taken])
                yield names[taken], tensor
                taken, mapped = taken + 1, mapped + tensor.nbytes
                del tensor
        names = names[taken:]


def _open_safetensors(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except FileNotFoundError:
        raise CheckpointError(f"{path} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is truncated or no safetensors file: {error}.") from None


def _pickle_headers(path: Path) -> dict[str, TensorInfo]:
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype if _is_plain(tensor) else None)
        for name, tensor in _load_pickle(path).items()
    }


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor is floating point and holds each of its values, which an expanded or sparse one does not."""
    if tensor.dtype not in _DTYPES.values() or tensor.layout != torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.untyped_storage().nbytes() >= tensor.nbytes


def _load_pickle(path: Path) -> dict[str, Tensor]:
    try:
        loaded = _unpickle(path)
    except Exception as error:  # noqa: BLE001  whatever a malformed or malicious pickle makes the restricted reader raise
        raise CheckpointError(
            f"{path} cannot be read as a pickle of tensors alone ({type(error).__name__}): it is damaged, or holds "
            "other objects, which are never loaded here."
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
