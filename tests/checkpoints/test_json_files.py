"""Configuration files read strictly."""

from pathlib import Path

import pytest

from florence2.checkpoints.files import MAX_JSON_BYTES, Fields, read_json
from florence2.errors import ConfigError, shown


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"[1]", "JSON object"),
        (b"{", "cannot be read as JSON"),
        (b"\xff", "cannot be read as JSON"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_a_malformed_file_is_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        read_json(path)


def test_absent_and_oversized_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_json(tmp_path / "config.json")
    huge = tmp_path / "huge.json"
    with huge.open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse: takes no disk
    with pytest.raises(ConfigError, match="larger than 16 MiB"):
        read_json(huge)


def test_every_problem_is_collected() -> None:
    problems: list[str] = []
    fields = Fields("part", {"a": "x", "b": -1, "c": [1, "2"], "d": 1, "e": 2.0, "odd": 3, "gelu": "tanh"}, problems)
    assert fields.take("missing", int, 5) == 5
    assert fields.take("d", float) == 1.0
    assert fields.take("e", float) == 2.0
    fields.take("absent", int)
    fields.take("a", int)
    fields.take("b", int)
    assert fields.take_tuple("c", int) == ()
    fields.finish(fixed={"gelu": ("exact",)})
    assert problems == [
        "part lacks 'absent'",
        "part.a must be int, not 'x'",
        "part.b must be a number from 0 to 2**53, but is -1",
        "part.c must be a list of int, not [1, '2']",
        "part.odd is an unknown field (value 3)",
        "part.gelu is 'tanh'; only 'exact' is implemented",
    ]


def test_true_is_no_number_and_nan_no_rate() -> None:
    problems: list[str] = []
    fields = Fields("part", {"n": True, "rate": float("nan")}, problems)
    fields.take("n", int)
    fields.take("rate", float)
    assert len(problems) == 2


def test_long_values_are_cut() -> None:
    assert len(shown("x" * 1000)) == 60
