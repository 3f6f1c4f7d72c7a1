"""The settings that all answers of a journal depend on, the hash of the model's weights among them."""

import argparse
import re
from pathlib import Path
from typing import Any

from florence2.checkpoints.files import find_weight_files, hash_file
from florence2.cli.run import Backend, search_settings

MAX_HASHED_BYTES = 4 << 30
"""Weights are hashed up to this size, at about a gigabyte a second."""
_DIGEST = re.compile(r"[0-9a-f]{64}")


def run_settings(options: argparse.Namespace, backend: Backend, path: Path) -> dict[str, Any]:
    """Return the settings of a run with the model at `path`. The hash keeps models apart that share a name."""
    weights = _weights_digest(path, options.allow_pickle)
    return search_settings(options) | backend.settings(options, path) | {"weights": weights}


def _weights_digest(path: Path, allow_pickle: bool) -> str | None:
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
