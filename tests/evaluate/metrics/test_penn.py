"""Tokens of captions, against those of the official code (Java) that `python -m parity.record_metrics` recorded."""

import pytest

from florence2.evaluate.metrics.penn import split_captions
from parity.records import read_record

RECORDED = read_record("evaluate/tokens.json")


def wrong(kind: str) -> list[str]:
    texts, expected = zip(*RECORDED[kind], strict=True)
    own = [" ".join(words) for words in split_captions(texts)]
    return [text for text, words, tokens in zip(texts, own, expected, strict=True) if words != tokens]


def test_every_recorded_caption() -> None:
    assert len(RECORDED["captions"]) == 1500
    assert wrong("captions") == []


@pytest.mark.parametrize(("kind", "most"), [("odd", 2), ("foreign", 1)])
def test_almost_every_odd_string(kind: str, most: int) -> None:
    """Strings that no one writes: of 25,000 of each kind a few dozen differ, such as "etc.w/ a"."""
    assert len(RECORDED[kind]) >= 500
    assert len(wrong(kind)) <= most


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A man's dog doesn't run.", "a man 's dog does n't run"),
        ("-lrb- in (red)", "-lrb- in -lrb- red -rrb-"),  # lower-casing comes before punctuation is removed
        ("state-of-the-art, well-known", "state-of-the-art well-known"),
        ("You cannot; gonna wanna", "you can not gon na wan na"),
        ("$5.00 for 1,000 at 10:30 a.m.", "$ 5.00 for 1,000 at 10:30 a.m."),
        ("“smart” ‘quotes’ — it’s", "smart quotes it 's"),
        ("3 1/2 stars", "3\u00a01/2 stars"),
        ("", ""),
        ("...?!", "?!"),
    ],
)
def test_chosen(text: str, tokens: str) -> None:
    assert split_captions([text]) == [tokens.split(" ") if tokens else []]


def test_the_next_caption_is_seen() -> None:
    assert split_captions(["sign no.", "5 dogs"]) == [["sign", "no."], ["5", "dogs"]]
    assert split_captions(["sign no.", "five dogs"]) == [["sign", "no"], ["five", "dogs"]]


def test_one_result_for_each_caption() -> None:
    assert split_captions(["a\nb\r\nc", "\u2028d\x85", "", "e"]) == [["a", "b", "c"], ["d"], [], ["e"]]
    assert split_captions([]) == []
