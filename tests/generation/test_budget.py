"""Predictions of memory, against what is really taken."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import florence2
from florence2.checkpoints.presets import preset
from florence2.errors import OptionError
from florence2.generation import budget as memory
from florence2.generation.budget import free_bytes, generation_bytes, how_many_fit, images_that_fit, vision_bytes
from parity.recipe import make_picture

CPU = torch.device("cpu")


def test_by_hand() -> None:
    """Base, float32, one beam, 100 ids, 590 positions: 6 layers of keys and values of 768 each, and so on."""
    options = florence2.GenerationOptions(num_beams=1, max_new_tokens=100)
    expected = 4 * (4 * 590 * (3072 + 768) + 2 * 6 * 768 * (590 + 100)) + 2 * 100 + 6 * 100 * 12 + 4 * 51289 * 4
    expected += 4 * 590 * 768 + 4 * 100 * 1000  # the memory and the locations' probabilities, for a confidence
    assert generation_bytes(preset("base"), options, 590, torch.float32) == expected
    half = generation_bytes(preset("base"), options, 590, torch.float16)
    assert expected / 2 < half < 0.6 * expected


def test_ten_beams_by_hand() -> None:
    """Base: every beam has keys and values of its own for the answer, and all share those of the memory."""
    options = florence2.GenerationOptions(num_beams=10, max_new_tokens=100)
    answer, shared = 2 * 6 * 768 * 10 * 100, 2 * 6 * 768 * 590
    encoder = 4 * 590 * (3072 + 768)
    expected = 4 * (encoder + shared + answer) + 2 * 10 * 10 * 100 + 6 * 10 * 100 * 12 + 4 * 10 * 51289 * 4
    assert generation_bytes(preset("base"), options.changed(confidence=False), 590, torch.float32) == expected


def test_the_limit_of_positions_counts() -> None:
    sizes = [
        generation_bytes(preset("base"), florence2.GenerationOptions(max_new_tokens=n), 590, torch.float32)
        for n in (1024, 5000)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.release  # a process whose memory is measured
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


def test_a_tenth_is_left_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    assert how_many_fit(900, CPU) == 1 and how_many_fit(450, CPU) == 2 and how_many_fit(451, CPU) == 1
    with pytest.raises(OptionError, match="One answer may take"):
        how_many_fit(950, CPU)


@pytest.mark.parametrize("size", [10**20, 10**400])
def test_more_than_a_float_holds_is_refused_too(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: 1000)
    with pytest.raises(OptionError, match="may take more than 1,000,000,000 GB"):
        how_many_fit(size, CPU)


def test_endless_beams_in_a_file_are_refused_when_they_are_asked_for(
    small: florence2.Florence2, picture_file: Path
) -> None:
    with pytest.raises(OptionError, match=r"may take .* GB .*lower max_new_tokens or num_beams"):
        small.run("<OD>", picture_file, num_beams=10**400)


GROUP = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 400\nfile 250\nkernel 50\n"}


@pytest.mark.parametrize(
    ("files", "machine", "free"),
    [
        ({}, 2, 550),  # the container has less than the machine's 2,048 bytes; 250 of the 700 used are pages of files
        ({}, 0, 0),  # the machine has less
        ({"memory.max": "max\n"}, 2, 2048),
        ({"memory.max": None}, 2, 2048),
        ({"memory.stat": "anon 400\n"}, 2, 300),
        ({"memory.current": "1300\n"}, 2, 0),
        ({"memory.current": "many\n"}, 2, 2048),
        ({}, None, 550),
        ({"memory.max": None}, None, None),
    ],
)
def test_the_smaller_of_the_machine_and_the_container(
    files: dict[str, str | None], machine: int | None, free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {**GROUP, **files}.items():
        if text is not None:
            (tmp_path / name).write_text(text)
    if machine is not None:
        (tmp_path / "meminfo").write_text(f"MemTotal: 9 kB\nMemAvailable: {machine} kB\n")
    monkeypatch.setattr(memory, "_GROUP", tmp_path)
    monkeypatch.setattr(memory, "_MACHINE", tmp_path / "meminfo")
    assert free_bytes(CPU) == free


def test_a_machine_has_some() -> None:
    assert (free_bytes(CPU) or 1) > 0
    assert free_bytes(torch.device("meta")) is None


def test_a_batch_that_does_not_fit_is_split(small: florence2.Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    requests = [("<OD>", make_picture(seed, 60, 40)) for seed in range(5)]
    options = small.options(max_new_tokens=5)
    together = small.run_batch(requests, options=options)
    each = generation_bytes(small.model.config, options, 600, torch.float32)
    monkeypatch.setattr(memory, "free_bytes", lambda _: 8.8 * each)  # of which a quarter is planned
    rows, original = [], small.model.step

    def step(newest, cache):
        rows.append(len(newest))
        return original(newest, cache)

    monkeypatch.setattr(small.model, "step", step)
    split = small.run_batch(requests, options=options)
    assert [answer.token_ids for answer in split] == [answer.token_ids for answer in together]
    assert max(rows) == 2 * options.num_beams
    monkeypatch.setattr(memory, "free_bytes", lambda _: each)
    with pytest.raises(OptionError, match="lower max_new_tokens or num_beams"):
        small.run_batch(requests, options=small.options(num_beams=500))
    with pytest.raises(OptionError, match="lower max_new_tokens or num_beams"):
        small.run("<OD>", requests[0][1], options=small.options(num_beams=500))


# ---- images ----------------------------------------------------------------------------------------------------------


def test_an_image_by_hand() -> None:
    """Base at 768 pixels: 192 x 192 positions of 128 channels in its first stage, twenty times, in float16."""
    vision = preset("base").vision
    assert vision_bytes(vision, 768, 768, torch.float16) == 20 * 192 * 192 * 128 * 2
    assert vision_bytes(vision, 768, 384, torch.float32) == 20 * 192 * 96 * 128 * 4
    assert vision_bytes(replace(vision, mlp_ratio=6.0), 768, 768, torch.float16) == 24 * 192 * 192 * 128 * 2
    late = replace(vision, patch_stride=(4, 1, 1, 1))  # the last stage is the largest: 193 - 1 + 2 - 3 + 1 positions
    assert vision_bytes(late, 768, 768, torch.float16) == 20 * 192 * 192 * 1024 * 2


@pytest.mark.release  # a process whose memory is measured
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="nothing here says what a process has taken")
@pytest.mark.parametrize(("attention", "size"), [("sdpa", 512), ("eager", 384)])
def test_images_take_what_was_planned(attention: str, size: int) -> None:
    code = r"""
import re, sys, torch
from pathlib import Path
from dataclasses import replace
from florence2.generation.budget import vision_bytes
from florence2.checkpoints.presets import preset
from florence2.model.davit import DaViT
torch.set_num_threads(1)
attention, size = sys.argv[1], int(sys.argv[2])
vision = replace(preset("base").vision, depths=(1, 1, 1, 1))
tower = DaViT(vision, attention).eval()
def peak():
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
with torch.inference_mode():
    tower(torch.randn(1, 3, 64, 64))
    pixels = torch.randn(3, 3, size, size)
    before = peak()
    tower(pixels)
print((peak() - before) / (3 * vision_bytes(vision, size, size, torch.float32)))
"""
    done = subprocess.run(
        [sys.executable, "-c", code, attention, str(size)], capture_output=True, text=True, check=True
    )
    assert 0.5 < float(done.stdout) < 1.1


@pytest.mark.parametrize(("free", "most", "fit"), [(4000, 64, 10), (4000, 7, 7), (10, 64, 1), (None, 64, 64)])
def test_images_that_fit(free: int | None, most: int, fit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda _: free)
    assert images_that_fit(100, CPU, most, 0.25) == fit


def test_what_is_free_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver has, and what torch holds idle on that device, but not in the pools of recorded graphs."""
    segments: list[dict[str, Any]] = [
        {"device": 1, "total_size": 500, "active_size": 200, "segment_pool_id": (0, 0)},
        {"device": 1, "total_size": 70, "active_size": 70, "segment_pool_id": (0, 0)},
        {"device": 0, "total_size": 9000, "active_size": 0, "segment_pool_id": (0, 0)},
        {"device": 1, "total_size": 8000, "active_size": 0, "segment_pool_id": (0, 3)},
    ]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (1000 * index, 10**9))
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert free_bytes(torch.device("cuda")) == free_bytes(torch.device("cuda:1")) == 1300
    assert free_bytes(torch.device("cuda:0")) == 9000
