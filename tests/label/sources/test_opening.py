"""Files and folders as items: the same images as `run` finds, lazily, with ids that do not repeat."""

import os
from pathlib import Path

import pytest

from florence2.bulk.sources import find_images
from florence2.errors import ImageError, OptionError
from florence2.label.sources.item import Ids, safe_stem
from florence2.label.sources.opening import open_sources
from parity.recipe import make_picture


@pytest.fixture
def album(tmp_path: Path) -> Path:
    folder = tmp_path / "album"
    for name in ("b.png", "a.png", "a/z.PNG", "a/b/c.png", "a.b/c.png", "notes.txt", ".hidden", "A.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        make_picture(len(name), 8, 8).save(folder / name, format="PNG")
    (folder / "linked").symlink_to(folder / "a")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    os.mkfifo(folder / "pipe.png")
    return folder


def ids(*arguments: object, **options) -> list[str]:
    return [str(item.source.id) for item in open_sources([str(argument) for argument in arguments], **options)]


def test_a_folder_gives_what_run_finds(album: Path) -> None:
    passed_over: list[Path] = []
    sources = open_sources([str(album)], passed_over=passed_over.append)
    names = [item.source.name for item in sources]
    assert names == [source.name for source in find_images([str(album)])] and len(names) == 6
    assert names == sorted(names, key=lambda name: Path(name).parts)
    assert [path.name for path in passed_over] == ["linked", "loop.png", "notes.txt", "pipe.png"]
    assert [item.source.name for item in sources] == names and len(passed_over) == 4  # the second time in silence


def test_ids_are_paths_below_what_all_arguments_share(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ids(album)[:3] == ["A.png", "a/b/c.png", "a/z.PNG"]
    monkeypatch.chdir(album)
    assert ids(".") == ids(album) == ids(f"../{album.name}")
    assert ids("a", "a.b") == ["a/b/c.png", "a/z.PNG", "a.b/c.png"]
    assert ids("b.png", "a") == ["b.png", "a/b/c.png", "a/z.PNG"]
    assert ids("a/z.PNG") == ["z.PNG"]


def test_an_image_that_is_named_twice_has_two_ids(album: Path) -> None:
    assert ids(album / "b.png", album / "b.png", album / "b.png") == ["b.png", "b.png-2", "b.png-3"]


def test_shards_are_parts_of_the_whole(album: Path) -> None:
    whole = ids(album, album / "b.png")
    parts = [ids(album, album / "b.png", shard=(number, 3)) for number in (1, 2, 3)]
    assert [part[0] for part in parts] == whole[:3] and sorted(parts[0] + parts[1] + parts[2]) == sorted(whole)
    assert whole[-1] == "b.png-2" and "b.png-2" in parts[0]
    for wrong in ((0, 3), (4, 3)):
        with pytest.raises(OptionError, match="does not exist; give i/n"):
            open_sources([str(album)], shard=wrong)


def test_images_in_tars_are_not_counted_beforehand(album: Path) -> None:
    """Also where only a pattern names the tar."""
    (album / "list.txt").touch()
    assert open_sources([str(album), str(album / "list.txt"), str(album / "b.png")]).are_listed
    (album / "x.TAR").touch()
    assert not open_sources([str(album / "*")]).are_listed


def test_the_output_folder_is_not_taken(album: Path) -> None:
    assert ids(album, output=album / "a") == ["A.png", "a.b/c.png", "a.png", "b.png"]


def test_one_folder_after_another_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(20):
        path = tmp_path / f"{number // 2:02}" / f"{number}.jpg"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    sources, read, scandir = open_sources([str(tmp_path)]), [], os.scandir

    def recorded(path: Path) -> object:
        read.append(Path(path).name)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", recorded)
    images = iter(sources)
    assert [next(images).source.id for _ in range(3)] == ["00/0.jpg", "00/1.jpg", "01/2.jpg"]
    assert read == [tmp_path.name, "00", "01"]


@pytest.mark.parametrize(
    ("argument", "sentence"),
    [("", "is empty"), ("-", "not read from stdin"), ("https://x/y.png", "is a URL"), ("data:x", "must begin")],
)
def test_arguments_that_name_nothing(argument: str, sentence: str) -> None:
    with pytest.raises(ImageError, match=sentence):
        open_sources(["photo.png", argument])


def test_a_folder_without_images_is_refused_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.txt").touch()
    with pytest.raises(ImageError, match=r"holds no image: .* 1 file was passed over, .* 1 .txt \(a.txt\)"):
        open_sources([str(tmp_path)])


def test_ids_that_repeat_are_numbered_past_those_in_use() -> None:
    table = Ids()
    assert [table.distinct(id) for id in ("x", "x-2", "x", "x", "x-2")] == ["x", "x-2", "x-3", "x-4", "x-2-2"]
    numbers = [str(number % 3000) for number in range(6000)]  # the table grows meanwhile
    assert len({table.distinct(number) for number in numbers}) == 6000


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("a/b", "a/b"),
        ("../../x", "x"),
        ("/etc/x", "etc/x"),
        ("C:\\x", "x"),
        ("..", "image"),
        ("", "image"),
        ("a\0", "a"),
    ],
)
def test_a_stem_stays_in_its_folder(name: str, stem: str) -> None:
    assert safe_stem(name) == stem
