"""The recipes of docs/modifying.md, each run by itself as it stands there."""

import inspect
import re
from pathlib import Path

import pytest
from torch import nn

import florence2
from florence2.model import bart, davit
from florence2.model.projection import Projection
from florence2.tracing.names import names_of
from florence2.tracing.selection import select

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "docs" / "modifying.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.S)
HEADINGS = [re.findall(r"^## (.*)$", TEXT[: TEXT.index(block)], re.M)[-1:] for block in BLOCKS]
NAMES = [f"{number} {(heading or ['explain_path'])[0]}" for number, heading in enumerate(HEADINGS)]


@pytest.mark.release
@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_recipe(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "docs/modifying.md", "exec"), {"__name__": "recipe"})


@pytest.mark.parametrize("block", BLOCKS, ids=NAMES)
def test_a_recipe_is_short(block: str) -> None:
    lines = [line for line in block.splitlines() if line.strip() and not line.strip().startswith("#")]
    code = [line for line in lines if not re.match(r"(import|from) ", line)]
    assert len(code) <= 15 and all(len(line) <= 120 for line in lines)


def test_there_is_a_recipe_for_every_change() -> None:
    numbered = re.findall(r"^## (\d+)\. ", TEXT, re.M)
    assert numbered == [str(number) for number in range(1, 15)]
    for number in numbered:
        section = TEXT.split(f"## {number}. ")[1].split("\n## ")[0]
        assert "```python" in section, number


ROWS = [row.split("|") for row in TEXT.split("| in place of |")[1].split("\n\n")[0].splitlines()[2:]]
CLASSES: list[type[nn.Module]] = [
    *(davit.DaViT, davit.ConvEmbed, davit.DualBlock, davit.ChannelBlock, davit.WindowAttention, davit.Mlp, Projection),
    *(bart.Encoder, bart.EncoderLayer, bart.DecoderLayer, bart.Attention, nn.Linear),
]


def test_replaced_modules_are_called_as_the_page_says() -> None:
    for row, kind in zip(ROWS, CLASSES, strict=True):
        written = re.search(r"`\(([\w, ]+)\)", row[2])
        assert written is not None
        expected = [name for name in inspect.signature(kind.forward).parameters if name != "self"]
        assert written[1].split(", ") == (["x"] if kind is nn.Linear else expected), row[1]


def test_names_that_modules_must_record_are_in_the_table() -> None:
    names = names_of(florence2.load("nano").model.config)
    for name in (name for row in ROWS for name in re.findall(r"`([\w.]+)`", row[3])):
        pattern = name.split("...")[0].replace(".I", ".*").replace(".J", ".*")
        assert select([f"**.{pattern}"], names)[f"**.{pattern}"], name


def test_modules_that_are_never_called() -> None:
    """Hooks on every module in one run: those that the page names do not fire, all that compute do."""
    f, fired = florence2.load("nano"), set()
    for path, part in f.model.named_modules():
        part.register_forward_hook(lambda module, inputs, output, path=path: fired.add(path))
    f.run("<OD>", ROOT / "docs" / "scene.png", num_beams=1, max_new_tokens=4, confidence=False)
    quiet = {path: part for path, part in f.model.named_modules() if path not in fired}
    holders = {path for path, part in quiet.items() if isinstance(part, nn.ModuleList | bart.LanguageModel)}
    tables = ("image_position_embed.row_embeddings", "image_position_embed.column_embeddings", "visual_temporal_embed")
    never = {"", *(f"multi_modal_projector.{path}" for path in tables)}
    assert set(quiet) - holders == {*never, "language_model.decoder"}
    f.run("<OD>", ROOT / "docs" / "scene.png", num_beams=1, max_new_tokens=4)  # read once more for a confidence
    assert not fired & never and "language_model.decoder" in fired
