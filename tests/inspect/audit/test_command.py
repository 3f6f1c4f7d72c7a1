"""`florence2 audit` as a user types it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from florence2.cli import main as cli
from florence2.inspect.audit.checkpoint import audit
from florence2.inspect.audit.difference import compare_checkpoints
from florence2.inspect.audit.page import render_audit
from tests.conftest import copy_checkpoint

Capture = pytest.CaptureFixture[str]
Change = Callable[[dict[str, torch.Tensor]], object]
FC1 = "language_model.model.encoder.layers.0.fc1.weight"


def run(*arguments: object) -> int:
    return cli.main(["audit", *map(str, arguments)])


def damage(tensors: dict[str, torch.Tensor]) -> None:
    tensors[FC1][2, 3] = math.nan
    tensors["language_model.model.encoder.layers.0.fc2.weight"][4:8] = 0
    tensors["language_model.model.decoder.layers.0.fc2.weight"][:, 4] = 0


@pytest.fixture
def damaged(plain_folder: Path, tmp_path: Path) -> Path:
    copy_checkpoint(plain_folder, tmp_path / "damaged", damage)
    return tmp_path / "damaged"


def test_text_of_one(plain_folder: Path, capsys: Capture) -> None:
    assert run(plain_folder, "--top", 2) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == f"{plain_folder}: microsoft layout, float32, 347,916 parameters in 160 tensors"
    measured = audit(plain_folder, spectra=False)
    assert lines[1].endswith(measured.sha256) and lines[4] == "no problems" and err == ""
    assert lines[2].startswith("parameters: vision_tower ") and sum(measured.parts.values()) == 347_916
    assert "language_model.shared 19,200 (5.52%)" in lines[2]
    assert lines[3].startswith("ties: language_model.shared.weight is stored as language_model.")
    assert lines[3].endswith(", equal bit for bit")
    table = lines[6 : lines.index("", 6)]
    assert table[0].split()[:4] == ["layer", "tensors", "parameters", "type"] and len(table) == 13
    assert len({len(line) for line in table}) == 1  # aligned
    embedding = next(line.split() for line in table if line.startswith("language_model.shared"))
    assert embedding[1:4] == ["1", "19,200", "f32"] and embedding[-1] == "97%"
    rest = lines[lines.index("", 20) :]
    headings = [i for i, line in enumerate(rest) if line.startswith(("largest singular values ", "lowest rank used "))]
    assert len(headings) == 2 and headings[1] - headings[0] == 4 and len(rest) == headings[1] + 3
    spectra = {tensor.name: tensor.spectrum for tensor in audit(plain_folder).tensors if tensor.spectrum}
    assert rest[headings[0] + 1].split()[0] == max(spectra, key=lambda name: spectra[name].largest)
    least = min(spectra, key=lambda name: spectra[name].effective_rank / spectra[name].side)
    assert rest[headings[1] + 1].split()[0] == least


def test_findings_come_first_and_decide_the_exit_code_only_when_asked(damaged: Path, capsys: Capture) -> None:
    assert run(damaged, "--no-spectra") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4:9] == [
        "problems; loading refuses this checkpoint:",
        "  language_model.encoder.layers.0.fc1.weight holds 1 NaN and 0 infinite of 8,192",
        "notes:",
        "  language_model.encoder.layers.0.fc2.weight: 4 of 64 rows are dead (4, 5, 6, 7)",
        "  language_model.decoder.layers.0.fc2.weight: 1 of 128 columns are dead (4)",
    ]
    assert not any(line.startswith("largest singular values") for line in lines)
    assert run(damaged, "--no-spectra", "--strict") == 1


def test_what_is_only_to_know_is_no_problem(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    copy_checkpoint(plain_folder, tmp_path / "dead", lambda tensors: tensors[FC1][3].zero_())
    assert run(tmp_path / "dead", "--no-spectra", "--strict") == 0
    assert "1 of 128 rows are dead (3)" in capsys.readouterr().out


def test_long_lists_are_cut(damaged: Path, capsys: Capture) -> None:
    assert run(damaged, "--no-spectra", "--top", 1) == 0
    out = capsys.readouterr().out
    assert "  and 1 more of this kind (--top, or --json for all)" in out and "columns are dead" not in out
    assert run(damaged, "--top", 0) == 0
    assert "largest singular values" not in capsys.readouterr().out


def test_json_of_one(damaged: Path, capsys: Capture) -> None:
    assert run(damaged, "--json") == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(audit(damaged).to_dict()))


def test_text_of_two(plain_folder: Path, damaged: Path, capsys: Capture) -> None:
    assert run(plain_folder, damaged, "--strict") == 1
    out = capsys.readouterr().out
    assert f"A: {plain_folder}: microsoft" in out and f"B: {damaged}: microsoft" in out
    assert "157 of 160 comparable tensors are equal value by value.\nThe configurations are equal." in out
    rows = {line.split()[0]: line.split() for line in out.splitlines() if "/" in line and line.startswith("language")}
    assert rows["language_model.encoder.layers.0"][1] == "14/16" and rows["language_model.encoder.layers.0"][-1] == "4"
    assert rows["language_model.shared"][1:4] == ["1/1", "0", "0"]
    most = out[out.index("most changed") :].splitlines()
    assert most[1].startswith("language_model.encoder.layers.0.fc2.weight") and "4 of 64" in most[1]
    assert most[3].split()[0] == "language_model.encoder.layers.0.fc1.weight"


def test_values_that_cannot_be_compared_are_named(plain_folder: Path, damaged: Path, capsys: Capture) -> None:
    assert run(plain_folder, damaged, "--no-spectra") == 0
    line = "language_model.encoder.layers.0.fc1.weight: 1 values are not finite in A or B and are left out"
    assert line in capsys.readouterr().out.splitlines()


def test_ties(plain_folder: Path, converted_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    """One name for the embedding in the native layout; several that differ, in a damaged one; a head of its own."""
    assert run(converted_folder, "--no-spectra", "--top", 0) == 0
    assert "ties: none; every tensor has one name" in capsys.readouterr().out
    copy_checkpoint(plain_folder, tmp_path / "own", lambda tensors: tensors["language_model.lm_head.weight"][0].add_(1))
    assert run(tmp_path / "own", "--no-spectra", "--strict") == 0
    assert "the output map has a weight of its own" in capsys.readouterr().out

    def differ(tensors: dict[str, torch.Tensor]) -> None:
        shared = tensors["language_model.model.shared.weight"]
        tensors["language_model.model.decoder.embed_tokens.weight"] = shared + 1

    copy_checkpoint(plain_folder, tmp_path / "untied", differ)
    assert run(tmp_path / "untied", "--no-spectra", "--top", 0) == 0
    assert "not all equal, see the problems" in capsys.readouterr().out


def test_a_page_and_a_json_file(plain_folder: Path, damaged: Path, tmp_path: Path, capsys: Capture) -> None:
    page, values = tmp_path / "audit.html", tmp_path / "audit.json"
    assert run(plain_folder, "--no-spectra", "--out", page) == 0
    assert capsys.readouterr().out == f"{page}\n"
    assert page.read_text(encoding="utf-8") == render_audit(audit(plain_folder, spectra=False))
    assert run(plain_folder, damaged, "--no-spectra", "--top", 3, "--out", page) == 2
    assert f"{page} exists; choose another name, or add --overwrite." in capsys.readouterr().err
    assert run(plain_folder, damaged, "--no-spectra", "--top", 3, "--out", page, "--overwrite") == 0
    compared = compare_checkpoints(plain_folder, damaged, spectra=False)
    assert page.read_text(encoding="utf-8") == render_audit(compared, 3)
    assert run(damaged, "--no-spectra", "--json", "--strict", "--out", values) == 1
    expected = json.loads(json.dumps(audit(damaged, spectra=False).to_dict()))
    assert json.loads(values.read_text(encoding="utf-8")) == expected


def test_text_of_two_layouts(plain_folder: Path, converted_folder: Path, capsys: Capture) -> None:
    assert run(plain_folder, converted_folder, "--no-spectra") == 0
    out = capsys.readouterr().out
    assert "only in A, not compared: final_logits_bias" in out
    assert "  layout: microsoft -> native" in out
    wanted = "language_model.shared.weight is 300 x 64 in A and 320 x 64 in B; the common 300 x 64 was compared"
    assert wanted in out


def test_the_same_weights(plain_folder: Path, capsys: Capture) -> None:
    assert run(plain_folder, plain_folder, "--strict") == 0
    assert "Both hold the same weights: 160 tensors are equal value by value." in capsys.readouterr().out


def test_json_of_two(plain_folder: Path, damaged: Path, capsys: Capture) -> None:
    assert run(plain_folder, damaged, "--json") == 0
    expected = compare_checkpoints(plain_folder, damaged).to_dict()
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(expected))


def test_progress_goes_to_stderr(plain_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("florence2.cli.progress._LOG_SECONDS", 0.0)
    assert run(plain_folder, plain_folder, "--no-spectra", "--json") == 0
    out, err = capsys.readouterr()
    assert f"160/160 tensors of {plain_folder}, " in err and err.count("\n") == 322
    json.loads(out)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "'nowhere'"),
        (["{folder}", "no/such/thing"], "'no/such/thing'"),
        (
            ["{folder}", "--revision", "main"],
            "and has no revisions; leave out 'main'",
        ),
        (
            ["{folder}", "{folder}", "--revision-b", "v2"],
            "and has no revisions; leave out 'v2'",
        ),
        (["{folder}", "--revision-b", "v2"], "only one is given; use --revision"),
        (["{folder}", "--top", "-1"], "--top is -1; it must be at least 0."),
        (["{folder}/tokenizer.json"], "tokenizer.json is truncated or"),
    ],
)
def test_wrong_input_gets_a_sentence(
    arguments: list[str], sentence: str, plain_folder: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*(word.replace("{folder}", str(plain_folder)) for word in arguments)) == 2
    out, err = capsys.readouterr()
    assert err.startswith("florence2: ") and sentence in err and out == ""


def test_a_pickle_only_when_asked(plain_folder: Path, tmp_path: Path, capsys: Capture) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(plain_folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_bytes((plain_folder / "config.json").read_bytes())
    assert run(tmp_path) == 2 and "only as a pickle" in capsys.readouterr().err
    assert run(tmp_path, "--allow-pickle", "--no-spectra", "--strict") == 0
    assert audit(plain_folder, spectra=False).sha256 in capsys.readouterr().out


def test_options_may_stand_between_the_checkpoints(plain_folder: Path, damaged: Path, capsys: Capture) -> None:
    assert run(plain_folder, damaged, "--top", 2, "--no-spectra") == 0
    expected = capsys.readouterr().out
    assert run(plain_folder, "--top", 2, damaged, "--no-spectra") == 0
    assert capsys.readouterr().out == expected
