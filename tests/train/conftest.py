"""A model small enough to train in a test, with the specimen's tokenizer."""

import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from florence2.checkpoints.checkpoint import save_checkpoint
from florence2.checkpoints.files import read_json, write_json
from florence2.model.config import Florence2Config
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from recipes.nano.train import make_model, nano_config
from recipes.nano.write_scenes import write_scenes
from tests.conftest import copy_processor
from tests.train.shared_run import SIZES
from tests.two_stages import two_stages


@pytest.fixture
def interruptible() -> Iterator[None]:
    """A shell starts what runs in the background deaf to Ctrl-C, and tests may run there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session")
def processor_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """nano's tokenizer and preprocessor settings. Do not write to it."""
    folder = tmp_path_factory.mktemp("processor")
    copy_processor(folder)
    return folder


@pytest.fixture(scope="session")
def processor(processor_folder: Path) -> Processor:
    """The processor of these files, for images of 64 x 64 pixels."""
    full = Processor.from_folder(processor_folder)
    return Processor(full.tokenizer, replace(full.image_config, height=64, width=64))


@pytest.fixture(scope="session")
def mini_config(processor: Processor) -> Florence2Config:
    """Two stages and one layer each, with every kind of dropout."""
    config = nano_config(processor.tokenizer.vocab_size)
    vision = replace(two_stages(config.vision), drop_path_rate=0.2)
    rates = {"dropout": 0.1, "attention_dropout": 0.1, "activation_dropout": 0.1}
    return replace(config, vision=vision, text=replace(config.text, **SIZES, **rates))


@pytest.fixture
def mini(mini_config: Florence2Config, processor: Processor) -> Florence2Model:
    """The model, untrained, the same each time."""
    return make_model(mini_config, processor, seed=3)


@pytest.fixture(scope="session")
def mini_folder(
    mini_config: Florence2Config, processor: Processor, processor_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same as a checkpoint. Do not write to it."""
    folder = tmp_path_factory.mktemp("checkpoints") / "mini"
    shutil.copytree(processor_folder, folder)
    settings = read_json(folder / "preprocessor_config.json")
    write_json(
        folder / "preprocessor_config.json", settings | {"size": {"height": 64, "width": 64}, "image_seq_length": 65}
    )
    save_checkpoint(make_model(mini_config, processor, seed=3), folder)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four images with two questions each. Do not write to it."""
    folder = tmp_path_factory.mktemp("data")
    write_scenes(folder, 5, 4, ["<OD>", "<CAPTION>"])
    return folder
