"""The measuring programs at work on a tiny model, and their arithmetic."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import scaling
from benchmarks import speed as bench
from benchmarks import traces as inspect_cost
from benchmarks.machine import count_step_bytes, count_vision_flops, measure_rates
from benchmarks.speed import Line
from florence2.checkpoints.presets import preset
from florence2.model.florence2 import Florence2Model


def test_one_engine_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset tiny --rounds 1 --repeats 1 --batch 2 --tokens 10 --threads 1".split()
    assert (
        bench.main([*words, "--peers", "", "--output", str(tmp_path / "t.md"), "--json", str(tmp_path / "t.json")]) == 0
    )
    table = capsys.readouterr().out
    assert (tmp_path / "t.md").read_text() == table.rstrip("\n") + "\n"
    for clock in ("JPEG to answer", "vision", "first step", "decode step", "four tasks, one picture", "batch of 2"):
        assert f"| {clock}" in table
    lines = json.loads((tmp_path / "t.json").read_text())["lines"]
    memory = next(line["rounds"]["ours"][0] for line in lines if line["clock"] == "peak memory")
    assert 50e6 < memory < 3e9


def test_ratios_are_taken_within_a_round() -> None:
    """The second round ran on a machine half as fast."""
    line = Line("vision", {"ours": [1.0, 2.0, 1.0], "native": [3.0, 6.0, 3.3]})
    assert line.ratio("native") == 3.0


def test_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset tiny --repeats 1 --pictures 1 2 --beams 1 2 --tokens 4 8 --sides 64 96 --threads 1 2".split()
    before = torch.get_num_threads()
    assert scaling.main([*words, "--output", str(tmp_path / "s.md")]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + 6 * 2 and torch.get_num_threads() == before


def test_what_traces_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "--preset tiny --tokens 6 --rounds 1".split()
    assert inspect_cost.main([*words, "--output", str(tmp_path / "c.md")]) == 0
    table = capsys.readouterr().out
    assert (tmp_path / "c.md").read_text() == table.rstrip("\n") + "\n" and "All answers have the same tokens" in table
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| ")]
    held = {row[0]: float(row[4].split()[0]) for row in rows[2:]}
    weights = 2 * 4 * 6 * 3 * (577 + 13) * 4 / 1e6  # layers, heads, steps, beams, positions, bytes
    assert held["no trace"] == 0.0 and held["cross-attention weights"] == pytest.approx(weights, abs=0.06)
    assert "Without a trace, a step passes 28 values and 7 scopes by" in table


def test_counted_work_is_that_of_the_formulas() -> None:
    """380 GFLOP for the vision tower of base at 768 pixels, 378 MB read for a step over 590 positions."""
    config = preset("base")
    assert count_vision_flops(config, (768, 768)) == pytest.approx(380.7e9, rel=0.01)
    text = Florence2Model(preset("tiny")).language_model
    step = sum(p.numel() for p in text.decoder.parameters()) + text.shared.weight.numel()
    counted = count_step_bytes(preset("tiny"), 0, torch.float32) / 4
    unread = sum(
        p.numel()
        for name, p in text.decoder.named_parameters()
        if "embed_positions" in name or "encoder_attn.k_proj" in name or "encoder_attn.v_proj" in name
    )
    assert counted == step - unread
    assert count_step_bytes(config, 590, torch.float32) == pytest.approx(378e6, rel=0.01)


def test_rates_are_positive() -> None:
    rates = measure_rates(preset("tiny"), (64, 64), "cpu", torch.float32)
    assert rates.products > 0 and rates.reading > 0
