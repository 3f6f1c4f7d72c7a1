"""Labels become classes: exactly, by case and white space, as plurals, or not at all."""

from pathlib import Path

import pytest

from florence2.dataset.classes import MAX_CLASSES_BYTES, Classes, read_classes
from florence2.errors import OptionError

NAMES = ["dog", "Dog", "traffic light", "people", "knife", "bus", "pony", "Mouse"]


@pytest.mark.parametrize(
    ("label", "name", "step"),
    [
        ("dog", "dog", "exact"),
        ("Dog", "Dog", "exact"),
        ("DOG", "dog", "case"),
        (" Traffic \n Light", "traffic light", "case"),
        ("dogs", "dog", "plural"),
        ("traffic lights", "traffic light", "plural"),
        ("person", "people", "plural"),
        ("Knives", "knife", "plural"),
        ("buses", "bus", "plural"),
        ("ponies", "pony", "plural"),
        ("mice", "Mouse", "plural"),
    ],
)
def test_steps(label: str, name: str, step: str) -> None:
    classes = Classes(NAMES, "error")
    assert classes.names[classes.number(label) or 0] == name
    assert {key: count for key, count in classes.counts.items() if count} == {step: 1}


@pytest.mark.parametrize("label", ["do", "doggy", "light", "pon", "", "s"])
def test_labels_that_fit_nothing(label: str) -> None:
    assert Classes(NAMES, "drop").number(label) is None
    with pytest.raises(OptionError, match="fits none of the 8 classes"):
        Classes(NAMES, "error").number(label)


def test_unmatched_labels_are_kept_and_listed() -> None:
    classes = Classes(["cat"])
    assert [classes.number(label) for label in ("zebra", "cats", "ape", "zebra", "Zebra")] == [1, 0, 2, 1, 3]
    assert classes.names == ["cat", "zebra", "ape", "Zebra"]
    assert classes.report() == {
        "names": ["cat", "zebra", "ape", "Zebra"],
        "labels": {"zebra": 2, "Zebra": 1, "ape": 1, "cats": 1},
        "matched": {"exact": 0, "case": 0, "plural": 1, "unmatched": 4},
        "unmatched": {"zebra": 2, "Zebra": 1, "ape": 1},
    }


def test_dropped_labels_are_listed() -> None:
    classes = Classes(["cat"], "drop")
    assert [classes.number(label) for label in ("ape", "cat", "ape")] == [None, 0, None]
    assert classes.names == ["cat"] and classes.report()["unmatched"] == {"ape": 2}


def test_without_classes_each_label_is_one() -> None:
    classes = Classes()
    assert [classes.number(label) for label in ("b", "a", "B", "b")] == [0, 1, 2, 0]
    assert classes.report() == {"names": ["b", "a", "B"], "labels": {"b": 2, "B": 1, "a": 1}}


def test_a_file_of_classes(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_bytes("\ufeffcat\r\n\n  traffic light \nÄpfel\n".encode())
    assert read_classes(path) == ["cat", "traffic light", "Äpfel"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"cat\ndog\n cat\n", "the class 'cat' on lines 1 and 3"),
        (b"\n \n", "holds no class"),
        (b"\xff\xfe", "is not text in UTF-8"),
        (b"a" * (MAX_CLASSES_BYTES + 1), "is larger than 1 MiB"),
        (None, "cannot be read: No such file"),
    ],
)
def test_wrong_files(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "classes.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        read_classes(path)
