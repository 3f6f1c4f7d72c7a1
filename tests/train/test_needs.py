"""What a run says that it needs, and what happens where that is not there."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from florence2.errors import OptionError
from florence2.generation.budget import USABLE
from florence2.model.florence2 import Florence2Model
from florence2.processor import Processor
from florence2.train import needs
from florence2.train.grouping import count_positions
from florence2.train.needs import (
    RunMemory,
    check_disk,
    describe_memory,
    describe_padding,
    expect_memory,
    update_or_explain,
)
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from tests.train.steps import SAMPLES, batch_of

ROOT = Path(__file__).parents[2]
LIMITED = """
import resource, sys
from florence2.cli.main import main
import florence2.train.trainer, torch
torch.set_num_threads(1)
def limit(*_):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + int(sys.argv[1]), resource.RLIM_INFINITY))
original = florence2.train.trainer._train_steps
florence2.train.trainer._train_steps = lambda *given: (limit(), original(*given))
sys.exit(main(sys.argv[2:]))
"""
"""A run under a limit of its address space, as `ulimit -v` sets one, from its first update on."""


def settings(**given: Any) -> TrainSettings:
    return TrainSettings(**{"batch": 3, "workers": 0, **given})


def test_the_size_of_a_batch_follows_from_the_samples(mini: Florence2Model, processor: Processor) -> None:
    """Six questions on three images."""
    shape = expect_memory(mini, processor, SAMPLES, settings(batch=30)).shape
    assert (shape.images, shape.pairs, shape.height, shape.width) == (30, 60, 64, 64)
    prompts = [len(processor.prompt(prefix)) for sample in SAMPLES for prefix, _ in sample.pairs]
    answers = [len(processor.encode(suffix)) for sample in SAMPLES for _, suffix in sample.pairs]
    assert (shape.prompt, shape.answer) == (max(prompts), max(answers))
    assert expect_memory(mini, processor, SAMPLES, settings(batch=30, micro_batch=4)).shape.images == 4
    assert expect_memory(mini, processor, SAMPLES, settings(batch=30), processes=4).shape.images == 8


def test_a_long_list_is_sampled(mini: Florence2Model, processor: Processor) -> None:
    read: list[int] = []

    class Many:
        def __len__(self) -> int:
            return 10_000

        def __getitem__(self, index: int) -> Sample:
            read.append(index)
            return SAMPLES[0]

    expect_memory(mini, processor, Many(), settings())
    assert len(read) == 64 and max(read) > 9_000


def test_less_is_needed_with_less_at_once(mini: Florence2Model, processor: Processor) -> None:
    need = expect_memory(mini, processor, SAMPLES, settings(batch=64))
    peaks = [need.peak(images) or 0 for images in (1, 8, 64)]
    assert 0 < peaks[0] < peaks[1] < peaks[2] == need.peak()
    assert need.that_fit(round(peaks[1] / USABLE) + 1) == 8 and need.that_fit(2 * peaks[2]) == 63
    assert need.that_fit(peaks[0]) == 0 and peaks[0] > 100_000_000  # torch's libraries
    fewer = expect_memory(mini, processor, SAMPLES, settings(batch=64, gradient_checkpointing=True))
    assert (fewer.peak() or 0) - peaks[0] < 0.7 * (peaks[2] - peaks[0])


def test_the_sentence_about_memory(mini: Florence2Model, processor: Processor, monkeypatch: pytest.MonkeyPatch) -> None:
    need = expect_memory(mini, processor, SAMPLES, settings(batch=64))
    size = r"[\d.]+ [GM]B"
    whole = rf"Memory: about {size} at the peak: {size} as now, {size} for the optimizer, and {size} for gradients and"
    monkeypatch.setattr(needs, "free_memory", lambda _: 1 << 50)
    assert re.fullmatch(f"{whole} 64 images at once.", describe_memory(need) or "")
    monkeypatch.setattr(needs, "free_memory", lambda _: _room(need, 5))
    advice = f", but only {size} are free. By estimate --micro-batch 5 fits; it changes neither .*"
    assert re.fullmatch(f"{whole} 64 images at once{advice}", describe_memory(need) or "")
    monkeypatch.setattr(needs, "free_memory", lambda _: 1)
    assert "Give --gradient-checkpointing, or train fewer parameters" in (describe_memory(need) or "")


def test_the_sentence_about_padding(mini: Florence2Model, processor: Processor) -> None:
    """Of one micro-batch with all three samples, and of micro-batches of one."""
    for size, updates in ((None, 1), (1, 3)):
        given = settings(micro_batch=size, shuffle=False, steps=20)
        need = expect_memory(mini, processor, SAMPLES, given)
        batches = [batch_of(processor, SAMPLES)] if size is None else [batch_of(processor, [one]) for one in SAMPLES]
        assert len(batches) == updates
        counted = [
            count_positions(b.attention_mask.sum(1).tolist(), (b.labels != -100).sum(1).tolist(), 65) for b in batches
        ]
        share = sum(padding for _, padding in counted) / sum(positions for positions, _ in counted)
        assert describe_padding(processor, SAMPLES, given, need) == (
            f"Padding: {share:.1%} of the positions of the text model."
        )


def test_a_model_of_unknown_size_is_not_spoken_of(mini: Florence2Model, processor: Processor) -> None:
    mini.language_model.encoder.register_forward_hook(lambda *given: float(given[2].sum()))
    need = expect_memory(mini, processor, SAMPLES, settings(batch=64))
    assert describe_memory(need) is None and need.recomputed() is None
    with pytest.raises(OptionError, match="update 3, with 64 images .* --micro-batch 32 fits"):
        update_or_explain(_failing(MemoryError()), 3, 1 << 40, lambda: need)


def _room(need: RunMemory, images: int) -> int:
    """Return the free bytes that hold `images` at once."""
    return round((need.peak(images) or 0) / USABLE) + 1


def _failing(error: Exception) -> Callable[[], float]:
    def update() -> float:
        raise error

    return update


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
def test_every_way_to_run_out_of_memory_is_one_sentence(
    mini: Florence2Model, processor: Processor, error: Exception
) -> None:
    need = expect_memory(mini, processor, SAMPLES, settings(batch=64))
    with pytest.raises(OptionError) as raised:
        update_or_explain(_failing(error), 7, _room(need, 6), lambda: need)
    assert str(raised.value).startswith(
        "Memory ran out in update 7, with 64 images computed at once. By estimate --micro-batch 6 "
    )
    assert raised.value.__cause__ is None and raised.value.__context__ is None  # which would hold the tensors


def test_other_errors_are_what_they_are(mini: Florence2Model, processor: Processor) -> None:
    with pytest.raises(RuntimeError, match="^other$"):
        update_or_explain(_failing(RuntimeError("other")), 1, None, lambda: pytest.fail("no advice is wanted"))
    assert update_or_explain(lambda: 2.5, 1, None, lambda: pytest.fail("no advice is wanted")) == 2.5


@pytest.mark.release  # processes under a limit of memory
def test_a_real_limit(data: Path, mini_folder: Path, tmp_path: Path) -> None:
    """Under 330 MB in addition, 240 images at once are too many, and 12 are not."""
    lines = (data / "data.jsonl").read_text().splitlines()
    names = [f"{index}.png" for index in range(240)]
    for name in names:
        shutil.copyfile(data / "000000.png", tmp_path / name)
    rows = [line.replace("000000.png", name) for name in names for line in lines if "000000.png" in line]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    words = f"train {tmp_path} --model {mini_folder} --out {tmp_path / 'run'} --steps 2 --batch 240 --workers 0"

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        quiet = {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", LIMITED, "330000000", *words.split(), "--device", "cpu", *more]
        return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **quiet})

    failed = run()
    assert failed.returncode == 2, failed.stderr[-2000:]
    last = failed.stderr.splitlines()[-1]
    found = re.search(
        r"Memory ran out in update 1, with 240 images computed at once. By estimate --micro-batch (\d+) fits", last
    )
    assert found and 0 < int(found[1]) <= 120 and "Traceback" not in failed.stderr, failed.stderr[-2000:]
    done = run("--micro-batch", "12", "--steps", "1")
    assert done.returncode == 0, done.stderr[-2000:]


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two states of three times the parameters, and the result; a state that is there already has its space."""
    free = [700]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": free[0]}))
    assert (
        check_disk(tmp_path / "new" / "run", 100, 100)
        == "Disk: 0 MB while the state is saved, and 0 MB for the result."
    )
    free[0] = 699
    with pytest.raises(OptionError, match=r"needs 0 MB of disk space in .*run, but only 0 MB are free. Make room"):
        check_disk(tmp_path / "new" / "run", 100, 100)
    (tmp_path / "state.pt").write_bytes(bytes(300))
    free[0] = 400
    check_disk(tmp_path, 100, 100)


def test_the_command_says_what_it_needs(
    data: Path, mini_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from florence2.train.command import main

    words = f"{data} --model {mini_folder} --out {tmp_path / 'run'} --steps 1 --batch 2 --workers 0 --device cpu"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OptionError, match="of disk space in .*run, but only 0 MB are free"):
        main(words.split())
    assert "Memory: about " in capsys.readouterr().err and not (tmp_path / "run").exists()
