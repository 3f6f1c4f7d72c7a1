"""`python -m benchmarks gpu` on a CPU with small sizes, what makes it fail, and weights that float16 can hold."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import florence2
from benchmarks import gpu
from benchmarks.__main__ import main
from benchmarks.agreement import Agreement, Scenes, format_agreement
from benchmarks.gpu_clocks import time_files, time_stages
from benchmarks.subject import BRANCH_SCALE, SEED, make_subject
from florence2.checkpoints.presets import preset
from florence2.errors import Florence2Error
from parity.cases import shapes
from parity.recipe import make_model
from parity.report import Comparison

SMALL = "--images 2 --jpegs 5 --lengths 3 --scenes 1 --runs 1 --repeats 1".split()


@pytest.mark.release
def test_everything_on_a_cpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "gpu_shapes", lambda: [shapes()[3]])
    words = ["gpu", "--device", "cpu", "--dtype", "bfloat16", "--presets", "tiny", "--peers", "", *SMALL]
    assert main([*words, "--output", str(tmp_path / "gpu.md")]) == 0, capsys.readouterr().out
    document = capsys.readouterr().out
    assert (tmp_path / "gpu.md").read_text() == document.rstrip("\n") + "\n"
    assert "Failures:\n\n- none\n" in document
    for line in (
        *("float32 against float64", "float32, recorded tokens, all settings", "float32, nano's recorded answers"),
        *("nano, float16 as float32", "tiny: load and first answer", "tiny, vision, 1 image", "tiny, step, 2 images"),
        *("tiny, whole, 2 images", "prompts of 3 lengths", "`florence2 run` over 5 JPEGs, after"),
    ):
        assert f"| {line}" in document
    assert "| bfloat16 | <OD>" in document and "| records of the remote code | logits" in document


@pytest.fixture
def sections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every section replaced by a note of its name."""
    seen: list[str] = []
    for name in ("_parts", "_recorded", "_scenes", "_stages", "_lengths", "_files"):
        monkeypatch.setattr(gpu, name, lambda *_, name=name, **__: seen.append(name))
    return seen


def test_a_failing_section_fails_and_the_others_run(
    sections: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gpu", "--presets", "tiny"]) == 0
    assert sections == ["_parts", "_recorded", "_scenes", "_stages", "_lengths", "_files"]
    sections.clear()

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(gpu, "_lengths", broken)
    assert main(["gpu", "--presets", "tiny", "large"]) == 1
    assert sections == ["_parts", "_recorded", "_scenes", "_stages", "_files", "_stages"]
    assert "- **lengths of prompts: no such kernel**" in capsys.readouterr().out


RECORDED = gpu._recorded


@pytest.mark.parametrize(("equal", "ties", "code"), [(98, 0, 0), (97, 1, 0), (97, 0, 1)])
def test_a_recorded_answer_that_differs_fails(
    equal: int, ties: int, code: int, monkeypatch: pytest.MonkeyPatch, sections: list[str]
) -> None:
    rows = [Comparison("records", "records", "tokens, all settings", equal, 98, ties=ties)]
    monkeypatch.setattr(gpu, "_recorded", RECORDED)
    monkeypatch.setattr(gpu, "compare_recorded", lambda *_: rows)
    assert main(["gpu", "--presets", "tiny"]) == code


@pytest.mark.release
def test_agreement_with_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = Scenes(florence2.load("nano", device="cpu", dtype="float32"), 1)
    exact = scenes.answers(scenes.exact)
    assert scenes.compare_recorded(exact).equal == len(exact) == 15
    assert scenes.compare_recorded([exact[0], [*exact[1][:-1], 5, 2], *exact[2:]]).equal == 14
    assert all(row.equal == row.total and not row.margins for row in scenes.compare(exact, torch.float32))
    wrong = [[*ids[:2], 9, 9, 9, *ids[2:]] for ids in exact]
    monkeypatch.setattr(Scenes, "answers", lambda *_: wrong)
    rows = scenes.compare(exact, torch.float32)
    assert sum(row.total for row in rows) == 15 and not any(row.equal for row in rows)
    assert min(margin for row in rows for margin in row.margins) > 0.1


def test_the_table_of_agreement_sums_up() -> None:
    rows = [Agreement("float16", "<OD>", 3, 4, [0.5]), Agreement("float16", "<OCR>", 1, 3, [0.1, 0.25])]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in format_agreement(rows).splitlines()]
    assert lines[2:] == [
        ["float16", "<OD>", "3 of 4", "0.500", "0.500"],
        ["float16", "<OCR>", "1 of 3", "0.175", "0.250"],
        ["float16", "all", "4 of 7", "0.250", "0.500"],
    ]


# ---- weights ---------------------------------------------------------------------------------------------------------


def test_what_is_added_to_the_stream_is_scaled() -> None:
    plain, scaled = make_model(preset("tiny"), SEED, 0.0), make_subject(preset("tiny"), 0.0)
    others = dict(plain.named_parameters())
    changed = {name for name, value in scaled.named_parameters() if not torch.equal(value, others[name])}
    ends = (".conv1.", ".conv2.", ".ffn.fc2.", ".window_attn.proj.", ".channel_attn.proj.")
    assert changed == {
        name for name in others if name.startswith("vision_tower.blocks") and any(e in name for e in ends)
    }
    assert all(torch.equal(scaled.get_parameter(name), BRANCH_SCALE * others[name]) for name in changed)


@torch.inference_mode()
def test_float16_holds_a_tower_as_deep_as_base() -> None:
    config = preset("tiny")
    config = replace(config, vision=replace(config.vision, depths=(1, 1, 9, 1)))
    pixels = torch.randn(1, 3, 128, 128, generator=torch.Generator().manual_seed(1))
    assert not make_model(config, SEED, 0.0).half().encode_image(pixels).isfinite().all()
    half, exact = make_subject(config, 0.0).half().encode_image(pixels), make_subject(config, 0.0).encode_image(pixels)
    assert (half - exact).abs().max() < 0.05 * exact.abs().max()


def test_times_of_weights_that_overflow_are_refused(
    small: florence2.Florence2, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(small.model, "encode_image", lambda pixels: torch.full((1, 3, 64), float("nan")))
    with pytest.raises(Florence2Error, match="NaN or infinities"):
        time_stages(small, 1, 1)


def test_a_folder_run_that_fails_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Florence2Error, match="answered 0 of 2 images: .*no-such-model"):
        time_files(tmp_path / "no-such-model", tmp_path, 2, "cpu", "float32", 60.0)
