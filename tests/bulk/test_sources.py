"""From command line arguments to images."""

import base64
import io
from collections.abc import Iterable
from pathlib import Path

import pytest

from florence2.bulk.rows import Row, TaskQuestion
from florence2.bulk.sources import DATASET_MARK, PassedOver, Source, find_images, find_unreadable
from florence2.errors import ImageError


def test_folders_files_and_names(album: Path) -> None:
    sources = find_images([str(album), "absent.png"])
    assert [Path(source.name).name for source in sources] == ["a.png", "b.jpg", "c.png", "d.png", "a.png", "absent.png"]
    assert [source.stem for source in sources] == ["a", "b", "c", "d", "deeper/a", "absent"]


def test_equal_stems_are_numbered(album: Path) -> None:
    stems = [source.stem for source in find_images([str(album / "a.png"), str(album / "deeper" / "a.png")])]
    assert stems == ["a", "a-2"]
    names = [str(album / "a.png"), str(album / "deeper" / "a.png"), "x/a-2.png", "a.gif"]
    assert [source.stem for source in find_images(names)] == ["a", "a-2", "a-2-2", "a-3"]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="holds no image: no file ends in .jpg"):
        find_images([str(tmp_path)])


def test_data_urls_are_images(picture_file: Path) -> None:
    data = picture_file.read_bytes()
    (source,) = find_images([f"data:image/png;base64,{base64.b64encode(data).decode()}"])
    assert source.data == data and source.stem == "data" and len(source.name) < 50
    with pytest.raises(ImageError, match="does not hold base64"):
        find_images(["data:image/png;base64,#"])


@pytest.mark.parametrize("url", ["https://example.com//a/x.png?u=http://b.c/d", "s3://bucket/x.png", "HTTP://a/b.jpg"])
def test_urls_are_refused_as_they_were_written(url: str) -> None:
    with pytest.raises(ImageError) as raised:
        find_images(["photo.png", url])
    assert str(raised.value).startswith(f"{url} is a URL, which is not fetched here; download it first")


def test_an_empty_name_is_not_the_current_folder(album: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(album)
    with pytest.raises(ImageError, match="empty"):
        find_images([""])


def test_stdin(monkeypatch: pytest.MonkeyPatch, picture_file: Path) -> None:
    class Stdin:
        buffer = io.BytesIO(picture_file.read_bytes())

    monkeypatch.setattr("sys.stdin", Stdin)
    (source,) = find_images(["-"])
    assert source.data == picture_file.read_bytes() and source.stem == "stdin"
    Stdin.buffer.seek(0)
    monkeypatch.setattr("florence2.bulk.sources.MAX_STDIN_BYTES", len(source.data))
    assert len(find_images(["-"])) == 1
    monkeypatch.setattr("florence2.bulk.sources.MAX_STDIN_BYTES", len(source.data) - 1)
    Stdin.buffer.seek(0)
    with pytest.raises(ImageError, match="stdin has more than"):
        find_images(["-"])


def test_endings_may_be_in_capitals(tmp_path: Path, picture_file: Path) -> None:
    for name in ("A.JPG", "B.Png"):
        (tmp_path / "album").mkdir(exist_ok=True)
        (tmp_path / "album" / name).write_bytes(picture_file.read_bytes())
    assert [source.stem for source in find_images([str(tmp_path / "album")])] == ["A", "B"]


def test_files_that_are_not_taken_are_reported(album: Path) -> None:
    """Hidden files are not: no user put them there."""
    for name in ("IMG_1.HEIC", "IMG_2.heic", "deeper/scan.xyz", "without", ".DS_Store"):
        (album / name).write_text("x")
    (album / "linked").symlink_to(album / "deeper")
    (album / "broken.png").symlink_to(album / "nowhere.png")
    passed: list[Path] = []
    sources = find_images([str(album)], passed_over=passed.append)
    assert len(sources) == 5
    names = ["IMG_1.HEIC", "IMG_2.heic", "broken.png", "deeper/scan.xyz", "linked", "notes.txt", "without"]
    assert [path.relative_to(album).as_posix() for path in passed] == names
    assert described(passed) == (
        "7 files were passed over, because they are not images of a format that is read here: "
        "2 .heic (IMG_1.HEIC, ...), 2 without an ending (linked, ...), 1 .png (broken.png), 1 .xyz (scan.xyz), "
        "1 .txt (notes.txt). Convert HEIC images to JPEG first."
    )


def described(paths: Iterable[Path]) -> str:
    passed_over = PassedOver()
    for path in paths:
        passed_over(path)
    return passed_over.describe()


def test_a_folder_of_nothing_else_names_them(tmp_path: Path) -> None:
    (tmp_path / "a.heic").write_text("x")
    with pytest.raises(ImageError, match=r"holds no image: .* 1 file was passed over, .* 1 \.heic .*\. Convert"):
        find_images([str(tmp_path)])


def test_many_kinds_of_files_are_cut_short(tmp_path: Path) -> None:
    """The most frequent kinds are named."""
    text = described(Path(f"file.{i if i % 3 else 'TXT'}") for i in range(300))
    assert text.startswith("300 files") and len(text) < 300
    assert ": 100 .txt (file.TXT, ...), 1 .1 (file.1), " in text and text.endswith(", and 195 of other kinds.")


def test_the_output_folder_is_not_input(album: Path, picture_file: Path) -> None:
    out = album / "answers"
    out.mkdir()
    (out / "a.od.png").write_bytes(picture_file.read_bytes())
    assert len(find_images([str(album)])) == 6
    assert len(find_images([str(album)], output=out)) == 5
    assert len(find_images([str(out)], output=out)) == 1  # named by the user


def test_a_dataset_in_the_folder_is_not_input(album: Path, picture_file: Path) -> None:
    """Its images are those that were labelled; they are taken where an argument names the dataset."""
    before = find_images([str(album)])
    images = album / "dataset" / "yolo" / "images"
    images.mkdir(parents=True)
    (images / "copy.png").write_bytes(picture_file.read_bytes())
    (images / "link.png").symlink_to(picture_file)
    assert len(find_images([str(album)])) == len(before) + 2
    (album / "dataset" / DATASET_MARK).touch()
    assert find_images([str(album)]) == before
    assert len(find_images([str(album / "dataset")])) == len(find_images([str(images)])) == 2


def test_an_empty_name_is_refused() -> None:
    with pytest.raises(ImageError, match="The name of an image is empty"):
        find_images([""])


def test_unreadable_images_are_found_unless_one_can_be_read(album: Path) -> None:
    bad, absent, good = find_images([str(album / "c.png"), "absent.png", str(album / "a.png")])
    errors = find_unreadable([bad, absent])
    assert list(errors) == [bad, absent] and "absent.png does not exist" in errors[absent]
    assert find_unreadable([bad, good, absent]) == {} == find_unreadable([])


def test_many_equal_stems(tmp_path: Path) -> None:
    """Numbering them takes linear time."""
    stems = [source.stem for source in find_images([f"{i}/a.png" for i in range(20_000)])]
    assert stems[:3] == ["a", "a-2", "a-3"] and len(set(stems)) == 20_000


class InTar:
    place = "/x/shard.tar!a.png"

    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self) -> bytes:
        if not self.data:
            raise ImageError("shard.tar ends within a.png.")
        return self.data


def test_members_of_other_files_are_read_where_they_are_needed(picture_file: Path) -> None:
    source = Source("shard.tar!a.png", InTar(picture_file.read_bytes()), "a", id="a")
    assert source.content() == picture_file.read_bytes() and source.version() is None
    row = Row(source, TaskQuestion("<OD>"), error="bad").to_dict()
    assert (row["image"], row["place"], row["id"]) == ("shard.tar!a.png", "/x/shard.tar!a.png", "a")
    torn = Source("shard.tar!b.png", InTar(b""), "b")
    assert find_unreadable([torn]) == {torn: "shard.tar ends within a.png."}
