"""docs/how-it-works: its blocks run, and its listings, tables and drawings are those of the code and the model."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import florence2
from florence2.checkpoints.presets import preset
from florence2.inputs.image import open_image
from florence2.model.bart import Positions
from florence2.model.projection import PositionTable
from florence2.pipeline import Florence2
from recipes.book.blocks import BLOCKS, BOOK, fill
from recipes.book.figures import DPI, DRAWINGS
from recipes.book.overview import THEMES, draw_overview
from recipes.book.values import CHAPTERS, SCENE, WIDE, load_nano, summaries

ROOT = Path(__file__).parents[2]
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(BOOK.glob("*.md"))}
CELLS = {name: re.findall(r"```python\n(.*?)```", PAGES[name], re.S) for name in CHAPTERS}


@pytest.fixture(scope="module")
def nano() -> Florence2:
    return load_nano()


def test_the_index_lists_every_chapter_in_order() -> None:
    assert re.findall(r"^\d+\. \[.*?\]\((\S+)\.md\)", PAGES["README"], re.M) == list(CHAPTERS)
    assert set(PAGES) == {"README", *CHAPTERS}


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_has_every_part(chapter: str) -> None:
    page = PAGES[chapter]
    assert page.startswith(f"# {list(CHAPTERS).index(chapter) + 1}. ")
    assert f"]({chapter}.png)" in page and len(CELLS[chapter]) == 1
    headings = re.findall(r"^## (.*)$", page, re.M)
    order = ["The code", "Shapes", "Try it", "A trap", "Questions people ask"]
    assert [heading for heading in headings if heading in order] == order
    assert re.search(r"<!-- made: listing", page) and re.search(r"<!-- made: \S+-shapes -->", page)
    assert len(re.findall(r"^\*\*.+\?.*\*\*|^\*\*.+\.\*\*", page.split("## Questions people ask")[1], re.M)) >= 4


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_its_block_runs(chapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = CELLS[chapter]
    assert "assert" in cell and len([line for line in cell.splitlines() if line.strip()]) <= 26
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    exec(compile(cell, f"docs/how-it-works/{chapter}.md", "exec"), {"__name__": "chapter"})


@pytest.mark.parametrize("page", PAGES)
def test_what_the_code_writes_is_up_to_date(page: str, nano: Florence2) -> None:
    assert fill(PAGES[page], nano) == PAGES[page], "python -m recipes.book writes it again"


@pytest.mark.release
def test_a_stale_page_would_be_noticed(nano: Florence2) -> None:
    page = PAGES["beam-search"]
    assert fill(page.replace("`row`", "`raw`"), nano) == page
    assert fill(page.replace("logits.argmax()", "logits.argmin()"), nano) == page


def test_every_kind_of_block_is_used() -> None:
    used = set(re.findall(r"<!-- made: (\S+)", "".join(PAGES.values())))
    assert used == set(BLOCKS)


def test_the_drawings_show_the_model(nano: Florence2) -> None:
    """The numbers that were drawn are nano's."""
    stored = json.loads((BOOK / "figures.json").read_text(encoding="utf-8"))
    measured = summaries(nano)
    assert set(stored) == set(measured)
    for chapter, values in measured.items():
        for name, value in values.items():
            if isinstance(value, dict):
                assert stored[chapter][name].pop("shape") == value.pop("shape")
                value, stored[chapter][name] = pytest.approx(value, rel=0.02, abs=1e-3), stored[chapter][name]
            assert stored[chapter][name] == value, (chapter, name)


@pytest.mark.release
@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_drawings_are_those_of_the_script(chapter: str, nano: Florence2, tmp_path: Path) -> None:
    """Up to the shapes of letters, which other versions of matplotlib draw otherwise."""
    DRAWINGS[chapter](CHAPTERS[chapter](nano)).savefig(tmp_path / "new.png", dpi=DPI)
    new, stored = grey(tmp_path / "new.png"), grey(BOOK / f"{chapter}.png")
    assert new.shape == stored.shape
    assert np.abs(new - stored).mean() < 3


@pytest.mark.parametrize("name", THEMES)
def test_the_drawing_of_the_model_has_the_sizes_of_base(name: str) -> None:
    drawn = (BOOK.parent / name).read_text(encoding="utf-8")
    assert drawn == draw_overview(THEMES[name])
    config = preset("base")
    for size in (config.vision.image_tokens(768, 768), config.text.d_model, f"{config.text.vocab_size:,}"):
        assert str(size) in drawn


def grey(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("L"), float)


def test_listings_are_about_twenty_lines() -> None:
    for name, page in PAGES.items():
        for listing in re.findall(r"```py\n(.*?)```", page, re.S):
            assert len(listing.splitlines()) <= 25, name


# what the pages say about a model that is computed otherwise


def eager(monkeypatch: pytest.MonkeyPatch, owner: type, change: Any) -> Florence2:
    """nano without faster ways, with another `forward` of one class."""
    monkeypatch.setattr(owner, "forward", change)
    return florence2.load("nano", device="cpu", attention="eager")


def test_halves_of_the_position_table_in_the_other_order(nano: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    right = PositionTable.forward

    def swapped(self: PositionTable, h: int, w: int) -> torch.Tensor:
        columns, rows = right(self, h, w).chunk(2, dim=-1)
        return torch.cat([rows, columns], dim=-1)

    boxes = {box.label: box.xyxy for box in nano.run("<OD>", SCENE, num_beams=1).boxes}
    f = eager(monkeypatch, PositionTable, swapped)
    word = f.run("<OD>", SCENE, num_beams=1, max_new_tokens=80).boxes[0]
    width, height = open_image(SCENE).size
    assert word.label == "word" and word.xyxy[0] < 10 < boxes["word"][0]
    assert word.xyxy[0] / width == pytest.approx(boxes["word"][1] / height, abs=0.02)  # transposed
    caption = f.run("<CAPTION>", SCENE, num_beams=1).text
    assert all(thing in caption for thing in ("digit 5", "word", "blue triangle", "arrow", "red triangle"))


def test_without_the_embedding_of_frame_0(nano: Florence2) -> None:
    f = florence2.load("nano", device="cpu")
    f.model.multi_modal_projector.visual_temporal_embed.pos_idx_to_embed.zero_()
    before, after = (each.run("<OD>", SCENE, num_beams=1).boxes[0] for each in (nano, f))
    assert before.label == after.label == "digit 5" and after.confidence < 0.75 < 0.95 < before.confidence


def test_positions_from_row_0(monkeypatch: pytest.MonkeyPatch) -> None:
    f = eager(monkeypatch, Positions, lambda self, start, length: self.weight[start:][:length])
    assert f.run("<OD>", SCENE, num_beams=1, max_new_tokens=60).boxes == ()


def test_another_bicubic() -> None:
    image = open_image(WIDE)
    pillow = np.asarray(image.resize((96, 96), Image.Resampling.BICUBIC), float)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()

    def difference(antialias: bool) -> float:
        resized = torch.nn.functional.interpolate(pixels, (96, 96), mode="bicubic", antialias=antialias)
        return float(np.abs(resized[0].permute(1, 2, 0).clamp(0, 255).numpy() - pillow).max())

    assert difference(antialias=True) < 2 < 50 < difference(antialias=False)


def test_the_mean_token_is_hardly_looked_at(nano: Florence2) -> None:
    assert max(CHAPTERS["encoder-decoder"](nano)["mean token"]) < 0.01
