"""Predictions of memory, against what is really taken."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import florence2
from florence2.checkpoints.presets import preset
from florence2.errors import OptionError
from florence2.generation import budget as memory
from florence2.generation.budget import free_bytes, generation_bytes, how_many_fit
from parity.recipe import make_picture

CPU = torch.device("cpu")


def test_by_hand() -> None:
    """Base, float32, one beam, 100 ids, 590 positions: 6 layers of keys and values of 768 each, and so on."""
    options = florence2.GenerationOptions(num_beams=1, max_new_tokens=100)
    expected = 4 * (4 * 590 * (3072 + 768) + 2 * 6 * 768 * (590 + 100)) + 2 * 100 + 6 * 100 * 12 + 4 * 51289 * 4
    assert generation_bytes(preset("base"), options, 590, torch.float32) == expected
    half = generation_bytes(preset("base"), options, 590, torch.float16)
    assert expected / 2 < half < 0.6 * expected


def test_the_limit_of_positions_counts() -> None:
    sizes = [
        generation_bytes(preset("base"), florence2.GenerationOptions(max_new_tokens=n), 590, torch.float32)
        for n in (1024, 5000)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing here says what a process has taken")
@pytest.mark.parametrize(("batch", "length", "beams", "ids"), [(6, 600, 4, 24), (2, 100, 10, 100)])
def test_it_is_what_is_taken(batch: int, length: int, beams: int, ids: int) -> None:
    """The growth of a process while it answers: most of it is the memory's keys and values, then the answer's."""
    code = r"""
import re, sys, torch, florence2
batch, length, beams, ids = map(int, sys.argv[1:])
torch.set_num_threads(1)
from pathlib import Path
from dataclasses import replace
from florence2.generation.budget import generation_bytes
from florence2.model.florence2 import Florence2Model
from florence2.checkpoints.presets import preset
tiny = preset("tiny")
config = replace(tiny, text=replace(tiny.text, d_model=512, vocab_size=999, decoder_layers=8, encoder_layers=1))
config = replace(config, vision=replace(config.vision, projection_dim=512))
model = Florence2Model(config, "eager").eval()
options = florence2.GenerationOptions(num_beams=beams, max_new_tokens=ids, min_new_tokens=ids - 1)
florence2.generate(model, torch.randn(1, 5, 512), options.changed(max_new_tokens=2, min_new_tokens=1))
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
before = peak()
florence2.generate(model, torch.randn(batch, length, 512), options)
taken = peak() - before
print(taken / (batch * generation_bytes(config, options, length, torch.float32)))
"""
    command = [sys.executable, "-c", code, *map(str, (batch, length, beams, ids))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 0.7 < float(done.stdout) < 1.1


def test_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 10**9)
    assert how_many_fit(10**8, CPU) == 9
    with pytest.raises(OptionError, match=r"may take 2.0 GB .* cpu has only 1.0 GB free; lower max_new_tokens"):
        how_many_fit(2 * 10**9, CPU)
    monkeypatch.setattr(memory, "free_bytes", lambda _: None)
    assert how_many_fit(10**8, CPU) > 10**6


def test_a_machine_has_some() -> None:
    assert (free_bytes(CPU) or 1) > 0
    assert free_bytes(torch.device("meta")) is None


def test_a_batch_that_does_not_fit_is_split(small: florence2.Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [("<OD>", make_picture(seed, 60, 40)) for seed in range(5)]
    options = small.options(max_new_tokens=5)
    together = small.run_batch(requests, options=options)
    each = generation_bytes(small.model.config, options, 600, torch.float32)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 2.5 * each)
    sizes, original = [], small._generate

    def generate(pictures, *rest):
        sizes.append(len(pictures))
        return original(pictures, *rest)

    monkeypatch.setattr(small, "_generate", generate)
    split = small.run_batch(requests, options=options)
    assert [answer.token_ids for answer in split] == [answer.token_ids for answer in together]
    assert sizes == [2, 2, 1]
    with pytest.raises(OptionError, match="lower max_new_tokens or num_beams"):
        small.run("<OD>", requests[0][1], options=small.options(num_beams=500))
