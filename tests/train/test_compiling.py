"""`--compile`: the same losses and gradients up to rounding, and a sentence where it cannot work."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters

from florence2.errors import OptionError
from florence2.model.bart import DecoderLayer, EncoderLayer
from florence2.model.config import Florence2Config
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train import grouping
from florence2.train.checkpoints import load_state
from florence2.train.compiling import compiled_layers
from florence2.train.gradient_checkpointing import gradient_checkpointing
from florence2.train.lora import LoraSettings, add_lora
from florence2.train.settings import TrainSettings
from florence2.train.trainer import train
from recipes.nano.train import SceneSamples, make_model
from tests.train.steps import backward, batch_of, close

ROOT = Path(__file__).parents[2]
# torch's own compiler reads it, and hides the warning where warnings are not errors
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")

has_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed, and --compile needs it")


@pytest.fixture(autouse=True)
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of all lengths in one group: a group of one row, and one without a mask, is compiled apart."""
    monkeypatch.setattr(grouping, "PADDING", 1.0)
    torch._dynamo.reset()


def graphs() -> int:
    """How many graphs were compiled in this process."""
    return int(counters["stats"]["unique_graphs"])


@pytest.mark.release  # it compiles for tens of seconds
@has_compiler
def test_losses_and_gradients_stay_the_same(mini: Florence2Model, processor: Processor) -> None:
    """Also of an adapter, whose layers have frozen weights, and where layers are recomputed."""
    add_lora(mini, LoraSettings(2, 4))
    mini.eval()  # without dropout
    batch, names = batch_of(processor), list(mini.state_dict())
    loss, gradients = backward(mini, batch)
    before = graphs()
    with compiled_layers(mini):
        assert list(mini.state_dict()) == names
        with gradient_checkpointing(mini):
            found, same = backward(mini, batch)
        assert found == pytest.approx(loss, rel=1e-5) and close(same, gradients, within=1e-4)
        compiled = graphs()
        assert before < compiled
        with torch.no_grad():  # an evaluation compiles nothing
            mini.encode(mini.encode_image(batch.pixel_values), batch.input_ids[:3])
        assert graphs() == compiled
    assert not [layer for layer in mini.modules() if "forward" in vars(layer)]


@pytest.mark.release  # it compiles for tens of seconds
@has_compiler
def test_layers_of_one_kind_share_what_was_compiled(mini_config: Florence2Config, processor: Processor) -> None:
    deep = replace(mini_config, text=replace(mini_config.text, encoder_layers=4, decoder_layers=4))
    model, batch = make_model(deep, processor, seed=3).eval(), batch_of(processor)
    before = graphs()
    with compiled_layers(model):
        backward(model, batch)
    layers = [layer for layer in model.modules() if isinstance(layer, EncoderLayer | DecoderLayer)]
    assert len(layers) == 8 and 2 <= graphs() - before <= 4


@pytest.mark.release  # it compiles for tens of seconds
@has_compiler
def test_a_run_resumes_with_it(mini_config: Florence2Config, processor: Processor, tmp_path: Path) -> None:
    """A run that is compiled for its second half ends where a plain one does, but for rounding."""
    rates = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}  # they would draw other numbers
    plain = replace(mini_config, text=replace(mini_config.text, **rates))
    settings = TrainSettings(
        steps=4, batch=2, learning_rate=1e-3, warmup=0, save_every=2, workers=0, freeze=("vision",)
    )
    whole, broken, again = (make_model(plain, processor, seed=3) for _ in range(3))
    train(whole, processor, SceneSamples(1, 4), settings, tmp_path / "whole")

    def stop(step: int, _: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, processor, SceneSamples(1, 4), settings, tmp_path / "broken", after_update=stop)
    assert load_state(tmp_path / "broken").step == 2
    before = graphs()
    train(again, processor, SceneSamples(1, 4), replace(settings, compile=True), tmp_path / "broken")
    assert graphs() > before
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=1e-3, atol=1e-4)


def test_layers_are_compiled_for_gradients_alone(
    mini: Florence2Model, processor: Processor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that notes its calls."""
    calls: list[Any] = []

    def note(function: Any, **given: Any) -> Any:
        def compiled(*values: Any, **named: Any) -> Any:
            calls.append(function)
            return function(*values, **named)

        return compiled

    monkeypatch.setattr(torch, "compile", note)
    batch = batch_of(processor)
    loss, gradients = backward(mini.eval(), batch)
    with compiled_layers(mini):
        found, same = backward(mini, batch)
        assert found == pytest.approx(loss, rel=1e-6) and close(same, gradients, within=1e-6)
        assert len(calls) == 1 + 2  # to see whether there is a compiler, and in a layer of each kind
        with torch.no_grad():
            mini.encode(mini.encode_image(batch.pixel_values), batch.input_ids[:3])
    backward(mini, batch)
    assert len(calls) == 1 + 2


def test_a_compiler_that_is_missing_is_one_sentence(mini: Florence2Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(function: Any, **given: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nTraceback")

    monkeypatch.setattr(torch, "compile", fail)
    needs = r"cannot compile here \(No working C\+\+ compiler found\)\. --compile needs a C\+\+ compiler such as g"
    with pytest.raises(OptionError, match=needs), compiled_layers(mini):
        pytest.fail("nothing may run")
    with compiled_layers(mini, active=False):
        mini.train()


@pytest.mark.release  # a command that looks for a compiler
def test_without_a_compiler_the_command_says_so(data: Path, mini_folder: Path, tmp_path: Path) -> None:
    """And what it had compiled for other runs does not hide it."""
    words = f"train {data} --model {mini_folder} --out {tmp_path / 'run'} --steps 1 --batch 2 --workers 0 --device cpu"
    done = subprocess.run(
        [sys.executable, "-m", "florence2", *words.split(), "--compile"],
        capture_output=True,
        text=True,
        env={**os.environ, "CXX": str(tmp_path / "no-compiler"), "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert "torch cannot compile here" in done.stderr.splitlines()[-1]
    assert "--compile needs a C++ compiler such as g++: install it, or leave --compile out." in done.stderr
