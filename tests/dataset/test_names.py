"""Names of files made from ids: none leaves its folder, none takes the place of another."""

import os
from pathlib import Path

import pytest

from florence2.dataset.names import MAX_PATH_BYTES, OutputNames, split_suffix

HOSTILE = [
    *("../../etc/passwd", "/etc/passwd", "a/../../b.jpg", "..", ".", "", "/", "//", "...", "a/...", "a\0b.jpg", "~/x"),
    *("C:\\x\\y.jpg", "..\\..\\x.jpg", "con.", "a /b .jpg", "x" * 300 + ".jpg", "ä" * 200, "a/" * 900 + "b.jpg"),
    *("\ud800.jpg", "a\nb", "\u202e.jpg", "a/b/" + "y" * 260 + "/c.jpg", "-rf", "*?.jpg"),
]


@pytest.mark.parametrize("id_", HOSTILE)
def test_hostile_ids_stay_inside(tmp_path: Path, id_: str) -> None:
    folder = tmp_path / "inside"
    name = OutputNames()(id_)
    path = folder / f"{name}.caption"
    assert os.path.normpath(path) == str(path) and folder in path.parents
    path.parent.mkdir(parents=True)
    path.write_bytes(b"")  # the file system takes it
    assert len(name.encode()) <= MAX_PATH_BYTES
    assert [each.name for each in tmp_path.iterdir()] == ["inside"]


def test_all_hostile_ids_have_names_of_their_own() -> None:
    names = OutputNames()
    given = [names(id_) for id_ in HOSTILE]
    assert len({name.casefold() for name in given}) == len(HOSTILE)
    assert names.renamed > 15


def test_usual_ids_keep_their_names() -> None:
    names = OutputNames()
    ids = ("a.jpg", "album/b.c.jpg", "2021/v1.2 final", "größe.jpeg", ".hidden.jpg", "key")
    assert [names(id_) for id_ in ids] == ["a", "album/b.c", "2021/v1.2 final", "größe", ".hidden", "key"]
    assert names.renamed == 0


def test_letter_case_and_endings_never_collide() -> None:
    names = OutputNames()
    given = [names(id_) for id_ in ("a.jpg", "A.jpg", "a.png", "a/b.jpg", "e\u0301.jpg", "\u00e9.jpg")]
    assert given[0] == "a" and given[1].startswith("A-") and given[2].startswith("a-") and given[3] == "a/b"
    assert len(set(given)) == 6 and names.renamed == 3 and len(given[1]) == len("A-") + 12


@pytest.mark.parametrize(
    "ids", [("x.jpg", "x.txt/y.jpg"), ("x.jpg", "x.t/y.jpg"), ("x.txt/y.jpg", "x.jpg"), ("d/X.png", "d/x.PNG/z/y.png")]
)
def test_a_folder_with_the_name_of_a_file(tmp_path: Path, ids: tuple[str, str]) -> None:
    names = OutputNames()
    for id_ in ids:
        name = names(id_)
        for ending in (".txt", ".png", ".jpg"):
            path = tmp_path / f"{name}{ending}".lower()  # as on a disk where letter case counts for nothing
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
    assert names.renamed == 1


def test_the_first_of_two_keeps_its_name_and_the_second_does_not_depend_on_it() -> None:
    assert [OutputNames()("A.jpg"), OutputNames()("a.jpg")] == ["A", "a"]
    one, two = OutputNames(), OutputNames()
    assert [one("a.jpg"), one("a.png")][1] == [two("a.gif"), two("a.png")][1]


def test_folders_that_are_reserved() -> None:
    names = OutputNames(reserved=("images",))
    assert names("coco/images/images.jpg") == "coco/images_/images"


def test_names_without_dots() -> None:
    names = OutputNames(dots=False)
    assert [names("v1.2/a.b.jpg"), names("v1.2/a_b.jpg")[:9]] == ["v1.2/a_b", "v1.2/a_b-"]


def test_endings() -> None:
    assert split_suffix("a/b.JPG") == ("a/b", ".JPG")
    for whole in ("a.b/c", ".hidden", "a/.hidden", "v1.2 final", "a.", "x.averylongone"):
        assert split_suffix(whole) == (whole, "")
