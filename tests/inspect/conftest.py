"""Checkpoints to be measured: as those of the other tests, but with few words, which is where most parameters are."""

from dataclasses import replace
from pathlib import Path

import pytest

from florence2.checkpoint import convert_checkpoint
from parity.cases import shapes
from parity.recipe import make_checkpoint
from tests.conftest import copy_checkpoint, without_bias


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Microsoft's layout with 300 tokens. Do not write to it."""
    folder, shape = tmp_path_factory.mktemp("plain"), shapes()[3]
    config = replace(shape.config, text=replace(shape.config.text, vocab_size=300))
    make_checkpoint(folder, config, shape.seed, shape.end_bonus, shape.size)
    return folder


@pytest.fixture(scope="session")
def converted_folder(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the native layout, except that it has no final_logits_bias; its embedding has 320 rows."""
    folder = tmp_path_factory.mktemp("converted")
    copy_checkpoint(plain_folder, folder / "unbiased", without_bias)
    convert_checkpoint(folder / "unbiased", folder / "native", "native")
    return folder / "native"
