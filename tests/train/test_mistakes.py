"""`docs/fine-tuning-mistakes.md`: every row on the page is tried, and must be answered as the page says."""

import re
import shutil
from pathlib import Path

import pytest
import torch

import florence2
from florence2.cli.main import main
from florence2.errors import ConfigError
from florence2.train.freeze import freeze
from florence2.train.lora import LoraSettings, add_lora

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "fine-tuning-mistakes.md").read_text(encoding="utf-8")
NANO = DOCS.parent / "weights" / "nano"
TRIED = re.findall(r"```json\n(.*?)\n```\n\n```\n(.*?)\n```", PAGE, re.DOTALL)


def answer(row: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the lines that `--check` prints for a file of one row."""
    shutil.copyfile(DOCS / "coffee.jpg", folder / "coffee.jpg")
    (folder / "broken.jpg").write_bytes((folder / "coffee.jpg").read_bytes()[:3000])
    (folder / "train.jsonl").write_text(row, encoding="utf-8")
    code = main(["train", str(folder), "--model", str(NANO), "--check"])
    assert code in (1, 2)
    return "".join(capsys.readouterr()).splitlines()


@pytest.mark.parametrize(("row", "message"), TRIED)
def test_a_row_is_answered_as_the_page_says(
    row: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in answer(row, tmp_path, capsys)


def test_the_page_has_rows() -> None:
    assert len(TRIED) == 6 == PAGE.count("```json")


def test_a_long_answer_and_a_broken_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    boxes = "".join(f"cup<loc_{i}><loc_20><loc_900><loc_600>" for i in range(1, 201))
    row = f'{{"image": "coffee.jpg", "prefix": "<OD>", "suffix": "{boxes}"}}'
    assert any(line in PAGE for line in answer(row, tmp_path, capsys) if line.startswith("cut: "))
    row = '{"image": "broken.jpg", "prefix": "<CAPTION>", "suffix": "a cup"}'
    found = [line.replace(str(tmp_path), "/tmp") for line in answer(row, tmp_path, capsys)]
    assert any(line in PAGE for line in found if line.startswith("unreadable: "))


def test_a_token_that_is_no_token_becomes_text() -> None:
    tokenizer = florence2.load("nano").processor.tokenizer
    assert len(tokenizer.encode("<loc_999>")) + 5 < len(tokenizer.encode("<loc_1000>"))


def test_what_is_misspelt_is_said() -> None:
    model = florence2.load("nano").model
    with pytest.raises(ConfigError) as raised:
        add_lora(model, LoraSettings(8, 16.0, targets=("q_proj", "o_proj")))
    assert str(raised.value) in PAGE
    with pytest.raises(ConfigError) as raised:
        freeze(model, ["vision_towr"])
    assert str(raised.value).split(", encoder")[0] in PAGE


def test_updates_vanish_in_half_precision() -> None:
    """AdamW's first update is as large as the rate: 1e-6 is under half a rounding of a weight of 0.02."""
    weight = torch.tensor(0.02, dtype=torch.bfloat16)
    assert weight - torch.tensor(1e-6, dtype=torch.bfloat16) == weight
    assert weight.float() - 1e-6 != weight.float()
