"""The contents of weight files, without a model: layout, names, stored types, sizes."""

import math
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence2.checkpoints.config_files import read_config
from florence2.checkpoints.files import checkpoint_folder, hash_file
from florence2.checkpoints.layouts import (
    ENCODER_EMBEDDING,
    HEAD,
    MAY_DIFFER,
    SHARED,
    TRANSPOSED,
    detect_layout,
    foreign_prefixes,
    held_name,
    to_canonical,
)
from florence2.checkpoints.tensors import WeightFiles, equals, find_weights
from florence2.errors import CheckpointError, listing, shown
from florence2.model.config import Layout


def describe_checkpoint(path: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """Describe a checkpoint from its headers and configuration, without reading weights into a model.

    Args:
        path: A folder, a weight file next to its `config.json`, or an index of shards.
        allow_pickle: Accept weights that exist only as a `.bin`.

    Returns:
        Plain JSON values: layout, number of tensors, values by stored type, parameters by part, the sizes of the
        model, its generation settings, and the name, bytes and SHA-256 of each weight file.

    Raises:
        CheckpointError, ConfigError: The files are missing, damaged, or in neither layout of Florence-2.
    """
    files = find_weights(path, allow_pickle)
    headers = files.read_headers(whole_numbers=True)
    config = read_config(checkpoint_folder(path))
    own = own_tensors(files)
    counted = {names[0]: canonical for canonical, names in stored_names(files, own).items()}  # tied ones count once
    parameters: Counter[str] = Counter()
    dtypes: Counter[str] = Counter()
    for name, info in headers.items():
        if name in counted:
            parameters[_module_of(counted[name])] += math.prod(info.shape)
            dtypes[str(info.dtype).removeprefix("torch.")] += math.prod(info.shape)
    return {
        "path": str(path),
        "layout": weights_layout(files, headers),
        "tensors": len(headers),
        "dtypes": dict(dtypes.most_common()),
        "parameters": {"total": sum(parameters.values()), **parameters},
        "image_tokens_from": list(config.vision.image_feature_source),
        "dim_embed": list(config.vision.dim_embed),
        "depths": list(config.vision.depths),
        "d_model": config.text.d_model,
        "layers": [config.text.encoder_layers, config.text.decoder_layers],
        "vocab_size": config.text.vocab_size,
        "untied": sorted(own | ({HEAD} if config.text.untied_head else set())),
        "max_position_embeddings": config.text.max_position_embeddings,
        "generation": dict(config.generation),
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": hash_file(file)} for file in files.paths],
    }


def own_tensors(files: WeightFiles) -> set[str]:
    """Return the canonical names of uses of the token embedding that have other values than it, and may have them."""
    headers = files.read_headers(whole_numbers=True)
    layout = weights_layout(files, headers)
    names = {canonical: name for name in headers if (canonical := to_canonical(name, layout)) is not None}
    base = names.get(SHARED) or names.get(ENCODER_EMBEDDING)
    may_differ = set(MAY_DIFFER[layout])
    if layout == "native" and SHARED in names:
        may_differ.add(ENCODER_EMBEDDING)  # nothing reads it there
    others = sorted(may_differ & names.keys())
    if base is None or not others:
        return set()
    tensors = files.read_named([base, *(names[name] for name in others)])
    shared = next(tensors).clone()
    return {name for name, tensor in zip(others, tensors, strict=True) if not equals(tensor, shared)}


def stored_names(files: WeightFiles, own: Container[str] = ()) -> dict[str, tuple[str, ...]]:
    """Return the canonical name of each tensor with the names under which `files` hold it.

    A tied tensor may have several, its own first; `own` has the uses of the token embedding that are not tied to it.
    A name that no rule knows is listed as "unknown: NAME". Raises CheckpointError when the layout is neither of
    Florence-2's.
    """
    headers = files.read_headers(whole_numbers=True)
    layout = weights_layout(files, headers)
    stored: dict[str, tuple[str, ...]] = {}
    for name in sorted(headers, key=lambda name: (to_canonical(name, layout) != SHARED, name)):
        canonical = held_name(to_canonical(name, layout), own) or f"unknown: {name}"
        stored[canonical] = (*stored.get(canonical, ()), name)
    return stored


def read_stored(files: WeightFiles, names: Sequence[str]) -> Iterator[Tensor]:
    """Yield the tensors stored under `names`, unchecked, in the canonical orientation; each valid until the next."""
    layout = weights_layout(files, files.read_headers())
    for name, tensor in zip(names, files.read_named(names), strict=True):
        yield tensor.T if to_canonical(name, layout) in TRANSPOSED[layout] and tensor.ndim == 2 else tensor


def weights_layout(files: WeightFiles, names: Iterable[str]) -> Layout:
    """Return the layout of the tensor `names` in `files`. Raises CheckpointError for neither of Florence-2's."""
    names = list(names)
    layout, prefixes = detect_layout(names), foreign_prefixes(names)
    if prefixes:
        count = sum(prefixes.values())
        which = f"All {count}" if count == len(names) else f"{count} of {len(names)}"
        begin = listing(sorted(map(shown, prefixes)), " or ")
        raise CheckpointError(
            f"{which} tensors of {files.paths[0]} have names that begin with {begin}, which a wrapper such as "
            "Lightning, DistributedDataParallel or torch.compile has put there. Save the model inside the wrapper, or "
            f"remove {begin} from every name."
        )
    if layout is None:
        some = listing(names, first=3) or "none"
        raise CheckpointError(
            f"{files.paths[0]} is in neither layout of Florence-2: its tensors ({some}) have other names."
        )
    return layout


def stored_dtype(files: WeightFiles) -> torch.dtype:
    """Return the floating-point type in which most of the values are stored."""
    counts: Counter[torch.dtype] = Counter()
    for info in files.read_headers(whole_numbers=True).values():
        assert info.dtype is not None
        if info.dtype.is_floating_point:
            counts[info.dtype] += math.prod(info.shape)
    return counts.most_common(1)[0][0]


def _module_of(canonical: str) -> str:
    """Return the part of the model that a tensor belongs to, and within the language model the part of that."""
    parts = canonical.split(".")
    return ".".join(parts[:2]) if parts[0] == "language_model" else parts[0]
