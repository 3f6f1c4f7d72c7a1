"""The site's hook: places of pages, links between them, the reference. `.ci/run` builds the site itself."""

import re
from pathlib import Path

import pytest

import florence2
from florence2.cli.main import COMMANDS
from recipes.book.site import (
    FRONT,
    command_line,
    linked_file,
    one_file,
    pages_elsewhere,
    repository_path,
    rewrite,
    site_path,
)

ROOT = Path(__file__).parents[2]
SETTINGS = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
NAV = re.findall(r"(\S+\.md)$", SETTINGS.split("\nnav:")[1], re.M)
PAGES = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")]


@pytest.mark.parametrize("path", ["README.md", "docs/limits.md", "docs/how-it-works/README.md", "parity/RESULTS.md"])
def test_a_page_comes_back_from_its_place(path: str) -> None:
    place = site_path(path)
    assert place is not None and repository_path(place) == path


def test_files_that_the_site_does_not_have() -> None:
    assert site_path("florence2/pipeline.py") is None  # source
    assert site_path("docs/nothing.md") is None


def test_links_follow_the_pages() -> None:
    text = "[a](docs/limits.md#images) [b](CHANGELOG.md) ![c](docs/scene.png) [d](florence2/model/bart.py) [e](https://x.org)"
    assert rewrite(text, "README.md") == "[a](limits.md#images) [b](changelog.md) ![c](scene.png) d [e](https://x.org)"
    assert rewrite("[a](../parity/RESULTS.md)", "docs/claims.md") == "[a](project/parity/RESULTS.md)"
    assert rewrite("[a](../../README.md)", "weights/nano/README.md") == "[a](../../../index.md)"
    assert rewrite("f.blocks[0](x) [1](2)", "README.md") == "f.blocks[0](x) [1](2)"


def test_every_page_has_a_place_in_the_menu() -> None:
    places = ({site_path(path) for path in PAGES} | set(FRONT.values())) - {None, "images.md"}
    assert places <= set(NAV) and len(NAV) == len(set(NAV))
    assert {repository_path(place) for place in NAV} - {
        "docs/reference/command-line.md",
        "docs/how-it-works/one-file.md",
    } <= {
        *PAGES,
        *pages_elsewhere(),
    }


def test_pages_elsewhere_are_found_by_links() -> None:
    found = pages_elsewhere()
    assert {*FRONT, "parity/RESULTS.md", "weights/nano/README.md"} <= found
    assert linked_file("../parity/RESULTS.md#tokens", "docs/claims.md") == "parity/RESULTS.md"


def test_the_reference_has_every_public_name() -> None:
    pages = [path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")]
    shown = {place for page in pages for place in re.findall(r"^::: (\S+)$", page, re.M)}
    homes = {f"{getattr(florence2, name).__module__}.{name}" for name in florence2.__all__ if name != "TASKS"}
    assert {home for home in homes if not {home, home.rpartition(".")[0]} & shown} == set()
    assert "florence2.inputs.tasks" in shown  # the home of TASKS


def test_the_command_line_has_every_command() -> None:
    page = command_line()
    assert re.findall(r"^## florence2 (\w+)$", page, re.M) == list(COMMANDS)
    assert page.count("usage: florence2 ") == len(COMMANDS)


def test_drawings_for_light_and_dark_pages() -> None:
    assert (
        rewrite((ROOT / "README.md").read_text(encoding="utf-8"), "README.md").count("model-dark.svg#only-dark)") == 1
    )


def test_the_file_of_the_model_is_a_page() -> None:
    assert (ROOT / "docs" / "florence2_minimal.py").read_text(encoding="utf-8") in one_file()
    assert rewrite("[a](../florence2_minimal.py)", "docs/how-it-works/davit.md") == "[a](one-file.md)"
    assert "how-it-works/one-file.md" in NAV


def test_nothing_comes_from_the_network() -> None:
    assert "font: false" in SETTINGS and not re.search(r"https?://", SETTINGS)
