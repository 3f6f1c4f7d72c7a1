"""Values of options: what texts mean, and which are refused."""

import argparse

import pytest

from florence2.cli.options.values import parse_box, parse_change, parse_devices


def test_a_box() -> None:
    assert parse_box("-1,2.5,3,4") == (-1, 2.5, 3, 4)
    assert parse_box("30,5,40,9") == (30, 5, 40, 9)


@pytest.mark.parametrize("text", ["", "1,2,3", "1,2,3,4,5", "1,2,3,x", "1,2,3,nan", "3,2,1,4", "1,4,3,2"])
def test_what_is_not_a_box(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not a box; give four numbers X1,Y1,X2,Y2"):
        parse_box(text)


def test_changes_are_json_or_text() -> None:
    texts = ("vision.window_size=8", "text.activation_function=silu", "vision.depths=[1, 2]", "a=", "a=b=c")
    assert [parse_change(text) for text in texts] == [
        ("vision.window_size", 8),
        ("text.activation_function", "silu"),
        ("vision.depths", [1, 2]),
        ("a", ""),
        ("a", "b=c"),
    ]
    for wrong in ("window", "=3"):
        with pytest.raises(argparse.ArgumentTypeError, match="is not a change; give NAME=VALUE"):
            parse_change(wrong)


def test_devices_are_names() -> None:
    assert parse_devices("cuda:0, cuda:1") == ["cuda:0", "cuda:1"]
    with pytest.raises(argparse.ArgumentTypeError, match="not a list of devices"):
        parse_devices("cuda:0,")
