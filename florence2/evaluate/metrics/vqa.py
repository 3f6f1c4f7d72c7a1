"""VQA accuracy: an answer is right as far as the people who answered the same question agree with it."""

import re
from collections.abc import Sequence

_CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()


def _spoilt(word: str) -> list[str]:
    """Return a word without any one of its apostrophes."""
    return [word[:place] + word[place + 1 :] for place, letter in enumerate(word) if letter == "'"]


_MENDED = {spoilt: word for word in _CONTRACTIONS for spoilt in _spoilt(word)} | {"somebody'd": "somebodyd"}
"""Contractions by their spellings without an apostrophe; the last one is a slip of the official table."""
_NUMBERS = "zero one two three four five six seven eight nine ten".split()
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = frozenset(("a", "an", "the"))
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_GROUPED_DIGITS = re.compile(r"[0-9],[0-9]")
_FULL_STOP = re.compile(r"\.(?![0-9])")
_MOST_FULL_STOPS = 32
"""The official code gives `re.UNICODE`, which is 32, in the place of the count of replacements."""
_ENOUGH = 3
"""So many people with the same answer make it right."""


def normalize_answer(answer: str) -> str:
    """Return an answer as the official code compares it: digits for numbers, no punctuation, no articles."""
    return _normalize_words(_remove_punctuation(answer))


def vqa_accuracy(answer: str, truths: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer.

    Args:
        answer: The model's answer.
        truths: What people answered to the same question, usually ten. They and the answer are normalized, unless all
            people gave the same answer.

    Returns:
        0 to 1: the mean over the people of min(1, matches / 3), where the matches are those of the other people.

    Raises:
        ValueError: `truths` is empty.
    """
    if not truths:
        raise ValueError("A question needs at least one true answer.")
    answer, truths = _tidy(answer), [_tidy(truth) for truth in truths]
    if len(set(truths)) > 1:
        answer, truths = normalize_answer(answer), [normalize_answer(truth) for truth in truths]
    same = [truth == answer for truth in truths]
    return sum(min(1.0, (sum(same) - own) / _ENOUGH) for own in same) / len(truths)


def _tidy(answer: str) -> str:
    return answer.replace("\n", " ").replace("\t", " ").strip()


def _remove_punctuation(answer: str) -> str:
    """Remove punctuation that stands next to a space, and let the rest of it be spaces."""
    text, grouped = answer, _GROUPED_DIGITS.search(answer) is not None
    for sign in _PUNCTUATION:
        apart = f"{sign} " in answer or f" {sign}" in answer
        text = text.replace(sign, "" if apart or grouped else " ")
    return _FULL_STOP.sub("", text, count=_MOST_FULL_STOPS)


def _normalize_words(answer: str) -> str:
    words = (_DIGITS.get(word, word) for word in answer.lower().split())
    return " ".join(_MENDED.get(word, word) for word in words if word not in _ARTICLES)
