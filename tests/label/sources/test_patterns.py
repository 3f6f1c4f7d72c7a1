"""Braces and wildcards in the names of files."""

from pathlib import Path

import pytest

from florence2.errors import ImageError
from florence2.label.sources.opening import open_sources
from florence2.label.sources.patterns import expand_braces
from parity.recipe import make_picture


@pytest.mark.parametrize(
    ("pattern", "paths"),
    [
        ("a.tar", ["a.tar"]),
        ("{00008..00010}.tar", ["00008.tar", "00009.tar", "00010.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("{0..2}-{a,b}", ["0-a", "0-b", "1-a", "1-b", "2-a", "2-b"]),
        ("{10..08}", ["10", "09", "08"]),
        ("{00..100..x}", ["{00..100..x}"]),
        ("{x}", ["{x}"]),
        ("{}", ["{}"]),
        ("a{,b}", ["a", "ab"]),
        ("}{", ["}{"]),
    ],
)
def test_braces(pattern: str, paths: list[str]) -> None:
    assert expand_braces(pattern) == paths


@pytest.mark.parametrize("pattern", ["{0..1000000}", "{0..999999999999999999}", "{0..1000}{0..1000}", "{,,}" * 13])
def test_braces_that_stand_for_too_much(pattern: str) -> None:
    with pytest.raises(ImageError, match="the limit is 1,000,000"):
        expand_braces(pattern)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("b.png", "a.png", "deep/x/c.png", "deep/d.png", "[1].png", "{1,2}.png"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(1, 8, 8).save(name)
    Path("a.txt").write_text("a caption")
    Path("a.md").touch()
    return tmp_path


def ids(*arguments: str, **options) -> list[str | None]:
    return [item.source.id for item in open_sources(arguments, **options)]


def test_wildcards(folder: Path) -> None:
    assert ids("*.png") == ["[1].png", "a.png", "b.png", "{1,2}.png"]
    assert ids("**/*.png") == ["[1].png", "a.png", "b.png", "deep/d.png", "deep/x/c.png", "{1,2}.png"]
    assert ids("deep/**/*.png") == ["d.png", "x/c.png"]
    assert ids("d*") == ["d.png", "x/c.png"]  # a folder
    assert ids("{a,b}.p?g") == ids("[ab].png") == ["a.png", "b.png"]


def test_files_that_a_pattern_did_not_mean(folder: Path) -> None:
    """A caption next to an image is not a list, unless the pattern asks for lists."""
    passed_over: list[Path] = []
    assert ids("a*", passed_over=passed_over.append) == ["a.png"]
    assert [path.name for path in passed_over] == ["a.md", "a.txt"]
    assert ids("*.txt") == ["a caption"]


def test_a_file_whose_name_looks_like_a_pattern(folder: Path) -> None:
    assert ids("[1].png") == ["[1].png"] and ids("{1,2}.png") == ["{1,2}.png"]


def test_a_pattern_that_matches_nothing(folder: Path) -> None:
    with pytest.raises(ImageError, match=r"No file or folder matches \*\.jpg"):
        ids("*.jpg")
    with pytest.raises(ImageError, match=r"1\.tar does not exist"):
        ids("{1..2}.tar")
