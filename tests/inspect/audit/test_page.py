"""The page of an audit as a file: what it says, and that it is closed to scripts and to the network."""

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from florence2.inspect.audit.checkpoint import Audit, audit
from florence2.inspect.audit.difference import compare_checkpoints
from florence2.inspect.audit.page import render_audit
from tests.conftest import copy_checkpoint

FC1 = "language_model.model.encoder.layers.0.fc1.weight"


class Cells(HTMLParser):
    """The rows of all tables as texts, and every element's name and attributes."""

    def __init__(self, page: str):
        super().__init__()
        self.rows: list[list[str]] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and self.found[-1][0] not in ("summary", "p", "li", "h2"):
            self.rows[-1][-1] += data.strip()

    def row(self, name: str) -> list[str]:
        """Return the last row of that name: a layer's comes before its tensors'."""
        return next(row for row in reversed(self.rows) if row and row[0] == name)


@pytest.fixture(scope="module")
def found(plain_folder: Path) -> Audit:
    return audit(plain_folder)


@pytest.fixture(scope="module")
def damaged(plain_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    def damage(tensors: dict[str, torch.Tensor]) -> None:
        tensors[FC1][2, 3] = math.nan
        tensors["language_model.model.decoder.layers.0.fc2.weight"] *= 1.5

    folder = tmp_path_factory.mktemp("damaged") / "<b>&amp;"
    copy_checkpoint(plain_folder, folder, damage)
    return folder


def test_every_layer_and_tensor_has_its_figures(found: Audit) -> None:
    page = Cells(render_audit(found))
    for module in found.modules:
        row = next(row for row in page.rows if row and row[0] == module.name and len(row) == 10)
        assert row[1:4] == [str(module.tensors), f"{module.parameters:,}", "f32"]
    assert len(found.tensors) == 160
    for tensor in found.tensors:
        row = next(row for row in page.rows if row and row[0] == tensor.name and len(row) == 17)
        assert row[1] == (" x ".join(map(str, tensor.shape))) and row[2] == "float32"
        assert float(row[3]) == pytest.approx(tensor.values.norm, rel=1e-3) and row[-1] == tensor.sha256[:16]
        if tensor.spectrum:
            assert float(row[13]) == pytest.approx(tensor.spectrum.largest, rel=1e-3)
    text = render_audit(found)
    assert found.sha256 in text and "No problems." in text
    assert sum(found.parts.values()) == found.parameters


def test_bars_are_as_long_as_their_figures_say(found: Audit) -> None:
    page = render_audit(found)
    layers = page[page.index("<h2>Layers") : page.index("<h2>Tensors")]
    rows = re.findall(r'<tr><th scope="row".*?</tr>', layers)
    lengths = [float(re.findall(r'<rect width="([\d.]+)"', row)[0]) for row in rows]
    largest = max(module.parameters for module in found.modules)
    assert lengths == pytest.approx([100 * module.parameters / largest for module in found.modules], abs=0.06)


def test_what_is_wrong_stands_out(damaged: Path) -> None:
    text = render_audit(audit(damaged, spectra=False))
    assert "language_model.encoder.layers.0.fc1.weight holds 1 NaN and 0 infinite" in text
    assert text.count('<tr class="bad">') == 2  # its layer and itself
    assert "<b>&" not in text and "&lt;b&gt;&amp;amp;" in text  # the folder's name


def test_two(plain_folder: Path, damaged: Path) -> None:
    compared = compare_checkpoints(plain_folder, damaged)
    text = render_audit(compared)
    page = Cells(text)
    assert "158 of 160 comparable tensors are equal value by value." in text
    assert page.row("language_model.decoder.layers.0.fc2.weight")[1:4] == ["64 x 128", "100%", "0.5"]
    assert "1 values are not finite in A or B" in text and text.count('<tr class="bad">') == 1
    assert "<h2>Most changed</h2>" in text and "<h2>Most changed</h2>" not in render_audit(compared, 0)


def test_links_lead_into_what_unfolds(found: Audit) -> None:
    page = Cells(render_audit(found))
    links = [(attributes["href"] or "")[1:] for tag, attributes in page.found if tag == "a"]
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert links == ids and len(ids) == len(found.modules)


def test_nothing_runs_and_nothing_is_fetched(found: Audit) -> None:
    page = Cells(render_audit(found))
    assert not {tag for tag, _ in page.found} & {"script", "img", "iframe", "object", "form"}
    (policy,) = [a["content"] or "" for _, a in page.found if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'") and "script-src" not in policy and "unsafe" not in policy
    assert all((a.get("href") or "#").startswith(("#", "data:,")) for _, a in page.found)
    assert not any("style" in attributes or "onclick" in attributes for _, attributes in page.found)
