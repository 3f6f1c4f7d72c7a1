"""The hash of a model's weights, by which answers of different weights with one name are kept apart."""

import re
from pathlib import Path

from florence2.checkpoints.files import find_weight_files, hash_file

MAX_HASHED_BYTES = 4 << 30
"""Weights are hashed up to this size, at about a gigabyte a second."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def weights_digest(path: Path, allow_pickle: bool = False) -> str | None:
    """Return the SHA-256 of the weights at `path`, several joined by "+"; None where they are too large to hash.

    In the cache of the Hub a file has its hash as its name.
    """
    files, _ = find_weight_files(path, allow_pickle)
    names = [file.resolve().name for file in files]
    if all(map(_DIGEST.fullmatch, names)):
        return "+".join(names)
    if sum(file.stat().st_size for file in files) > MAX_HASHED_BYTES:
        return None
    return "+".join(map(hash_file, files))
