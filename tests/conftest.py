"""Checkpoints that the tests share: made here, small, with every size different from the next."""

import importlib
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2.checkpoints.checkpoint import convert_checkpoint
from florence2.model.trace import NO_TRACE, Trace
from parity.cases import SyntheticModel, shapes
from parity.recipe import make_checkpoint, make_picture

torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start: xdist has work for every core
# Bytecode is written for the tests even where it is switched off: a hundred processes would compile every file again.
sys.dont_write_bytecode = False
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
if not torch.cuda.is_available():  # read when Triton is imported, which importing torch does not do
    os.environ.setdefault("TRITON_INTERPRET", "1")

NANO = Path(__file__).parents[1] / "weights" / "nano"

SHARED_FOLDERS = ("tests/export/", "tests/lite/", "tests/serve/")
"""Folders whose files share an export or a server, which take seconds to make."""

pytest_plugins = ["tests.traced"]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give a file to one worker, so that what its tests share, such as a server, is made once; some folders too."""
    if config.getoption("dist") != "load":
        return None
    scheduler = importlib.import_module("xdist.scheduler").LoadFileScheduling(config, log)
    file_of = scheduler._split_scope
    scheduler._split_scope = lambda name: next(filter(name.startswith, SHARED_FOLDERS), file_of(name))
    return scheduler


@pytest.fixture(scope="session")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in Microsoft's layout: two stages, one text layer, 160 x 224 pixels. Do not write to it."""
    folder = tmp_path_factory.mktemp("small")
    shape = shapes()[3]
    make_checkpoint(folder, shape.config, shape.seed, shape.end_bonus, shape.size)
    return folder


@pytest.fixture(scope="session")
def native_folder(small_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in the native layout, except that it has no final_logits_bias."""
    return copy_native(small_folder, tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def small(small_folder: Path) -> florence2.Florence2:
    """The small checkpoint, loaded."""
    return florence2.load(small_folder)


@pytest.fixture
def picture() -> Image.Image:
    """A picture that is neither square nor of the model's size."""
    return make_picture(5, 320, 200)


@pytest.fixture
def picture_file(picture: Image.Image, tmp_path: Path) -> Path:
    """The same as a file."""
    path = tmp_path / "photo.png"
    picture.save(path)
    return path


def copy_checkpoint(
    source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], object] | None = None
) -> None:
    """Copy a checkpoint folder, with its tensors changed."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(source, target)
    if change is not None:
        tensors = load_file(target / "model.safetensors")
        change(tensors)
        save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def copy_native(source: Path, folder: Path) -> Path:
    """Write a checkpoint in the native layout, which has no final_logits_bias, into a folder; return where it is."""
    copy_checkpoint(source, folder / "unbiased", without_bias)
    convert_checkpoint(folder / "unbiased", folder / "native", "native")
    return folder / "native"


def copy_processor(folder: Path) -> None:
    """Copy nano's tokenizer and preprocessor settings; training them again takes two seconds."""
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(NANO / name, folder / name)


def without_bias(tensors: dict[str, torch.Tensor]) -> None:
    """Make final_logits_bias zero, which is what the native layout can say."""
    tensors["language_model.final_logits_bias"].zero_()


def few_words(shape: SyntheticModel) -> SyntheticModel:
    """The same with 999 tokens, for most of a step goes into 51,289; its answers still end at different lengths."""
    return replace(shape, config=replace(shape.config, text=replace(shape.config.text, vocab_size=999)), end_bonus=8.0)


def keep_only(*kept: str) -> Callable[[dict[str, torch.Tensor]], None]:
    """Leave the tied embedding under some of its names in Microsoft's layout alone."""
    names = {
        "shared": "language_model.model.shared.weight",
        "lm_head": "language_model.lm_head.weight",
        "encoder": "language_model.model.encoder.embed_tokens.weight",
        "decoder": "language_model.model.decoder.embed_tokens.weight",
    }

    def change(tensors: dict[str, torch.Tensor]) -> None:
        table = tensors.pop(names["shared"])
        del tensors[names["lm_head"]]
        tensors.update({names[key]: table.clone() for key in kept})

    return change


def random_box(rng: np.random.Generator, width: int, height: int) -> tuple[float, float, float, float]:
    """A box inside a picture."""
    x1, x2 = sorted(rng.uniform(0, width, 2))
    y1, y2 = sorted(rng.uniform(0, height, 2))
    return (x1, y1, x2, y2)


def count_encodings(model: florence2.Florence2, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows by the batch size whenever the vision tower runs."""
    calls: list[int] = []
    original = model.model.encode_image

    def encode_image(pixel_values: torch.Tensor, trace: Trace = NO_TRACE) -> torch.Tensor:
        calls.append(len(pixel_values))
        return original(pixel_values, trace)

    monkeypatch.setattr(model.model, "encode_image", encode_image)
    return calls
