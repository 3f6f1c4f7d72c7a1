"""Tokens of captions, against those of the official code (Java) that `python -m parity.record_metrics` recorded."""

import pytest

from florence2.evaluate.metrics.penn import split_captions
from parity.records import read_record

RECORDED = read_record("evaluate/tokens.json")


def wrong(kind: str) -> list[str]:
    texts, expected = zip(*RECORDED[kind], strict=True)
    own = [" ".join(words) for words in split_captions(texts)]
    return [text for text, words, tokens in zip(texts, own, expected, strict=True) if words != tokens]


@pytest.mark.parametrize(("kind", "count"), [("captions", 1500), ("odd", 1000), ("foreign", 500)])
def test_every_recorded_string(kind: str, count: int) -> None:
    """Of 25,000 odd strings, which no one writes, five differ, such as "cannot'STOP'"; none of those is recorded."""
    assert len(RECORDED[kind]) == count
    assert wrong(kind) == []


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
        ("C'mon, Cap’n Crunch and S'Mores for 'Em.", "c'mon cap’n crunch and s'mores for 'em"),
        ("D’Angelo’s li’l dog, rock 'n roll since the '80S", "d’angelo 's li l dog rock 'n roll since the '80s"),
        ("’twas a sign :-) for a.b+c.com ;P", "twas a sign :--rrb- for a.b+c.com ;p"),
        ("call +1 (555) 555-1234 or 0555 123456.", "call +1 -lrb-555-rrb-\u00a0555-1234 or 0555\u00a0123456"),
        ("IMG_1.png and 9.jpg, 9.pptx", "img_1 png and 9.jpg 9 pptx"),
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
