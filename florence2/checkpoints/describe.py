"""What a checkpoint holds, said without loading it."""

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

from florence2.checkpoints.checkpoint import checkpoint_folder, stored_names, weights_layout
from florence2.checkpoints.config_files import read_config
from florence2.checkpoints.tensors import find_weights


def describe_checkpoint(path: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """What `path` holds, from its headers and configuration: layout, types, sizes, parameters, hashes."""
    files = find_weights(path, allow_pickle)
    headers = files.read_headers()
    config = read_config(checkpoint_folder(path))
    counted = {names[0]: canonical for canonical, names in stored_names(files).items()}  # tied ones count once
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
        "max_position_embeddings": config.text.max_position_embeddings,
        "generation": dict(config.generation),
        "files": [{"name": file.name, "bytes": file.stat().st_size, "sha256": hash_file(file)} for file in files.paths],
    }


def hash_file(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal: what the Hub shows for its large files."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _module_of(canonical: str) -> str:
    """The part of the model that a tensor belongs to; of the language model's, its part."""
    parts = canonical.split(".")
    return ".".join(parts[:2]) if parts[0] == "language_model" else parts[0]
