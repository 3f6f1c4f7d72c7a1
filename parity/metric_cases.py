"""Cases for the metrics of benchmarks, from seeds: captions, odd strings, answers of ten people, phrases with boxes."""

from random import Random
from typing import NamedTuple

_BEGINNINGS = ["A", "The", "Two", "An old", "Several", "5", "A man's", "This is a", "There's a"]
_ADJECTIVES = """
    red|well-lit|t-shirt-wearing|9-year-old|(large)|"No Parking"|black & white|double-decker|1950's|x-ray|Fisher-Price||
""".strip().split("|")
_THINGS = """
    man|dog|woman's hand|stop sign|Mr. Smith|U.S. flag|St. Bernard|Nokia 3310|Coca-Cola|t.v.|TV|Dr. Pepper|dogs'|AT&T
    |7-Up|#23 jersey|bottle of Jack Daniel's|page 12|sign that says 'STOP'|book titled "The Lord"|mother-in-law|café
    |o'clock
""".replace("\n    ", "").strip().split("|")  # fmt: skip
_ACTIONS = "is|isn't|can't be|cannot be|doesn't look|and|sitting on|reads|it's|they're|who's gonna|won't|with".split(
    "|"
)
_ENDINGS = """
    at 10:30 a.m.|in 1987.|for $5.99|costs 1,000 dollars|...|!|?|.| .|on 5/12/2010.|on 5th Ave.|50% off|etc.
    |by J. K. Rowling|in Washington D.C.|and/or a cat.|http://www.flickr.com.|no. 7|vol. 2|Inc.|w/ cheese|1/2 price
    |3 1/2 stars|- great|with 'love'|12" pizza|5'10" tall|&|:)|near a.b.c|of a K. The dog
""".replace("\n    ", "").strip().split("|")  # fmt: skip
_LETTERS = "abcXYZ019 .,'\"-_/()[]{}<>@#$%^&*+=~`|\\:;!?  "
_FOREIGN_LETTERS = "aéßñÉçöΩпр日本語한中“”‘’–—…«»½¼°×©®™£€¥¢•§→♥ı　 abc xyz .,'s 12 3"


def draw_captions(count: int, seed: int) -> list[str]:
    """Return sentences as people and models write them about images, with the odd spellings of some."""
    random = Random(seed)
    return [_caption(random) for _ in range(count)]


def _caption(random: Random) -> str:
    pick = random.choice
    words = [pick(_BEGINNINGS), pick(_ADJECTIVES), pick(_THINGS), pick(_ACTIONS), pick(_BEGINNINGS).lower()]
    words += [pick(_ADJECTIVES), pick(_THINGS), pick(_ENDINGS)]
    text = " ".join(word for word in words if word)
    text = text.lower() if random.random() < 0.3 else text
    return f"{text}." if random.random() < 0.2 else text


def draw_odd_strings(count: int, seed: int) -> list[str]:
    """Return strings that no one writes: words without spaces between them, and random ASCII."""
    random, words = Random(seed), [word for text in (*_THINGS, *_ENDINGS, *_ACTIONS) for word in text.split()]
    return [_odd_string(random, words) for _ in range(count)]


def _odd_string(random: Random, words: list[str]) -> str:
    kind = random.randrange(4)
    if kind < 2:
        return " ".join(random.choice(words) for _ in range(random.randint(1, 8)))
    if kind == 2:
        return "".join(random.choice(words) + random.choice(("", "", " ")) for _ in range(random.randint(1, 6)))
    return "".join(random.choice(_LETTERS) for _ in range(random.randint(1, 20)))


def draw_foreign_strings(count: int, seed: int) -> list[str]:
    """Return random strings with letters and signs beyond ASCII."""
    random = Random(seed)
    return ["".join(random.choice(_FOREIGN_LETTERS) for _ in range(random.randint(1, 20))) for _ in range(count)]


_CHOSEN_ANSWERS = """
    yes|Yes.|yes!|no|none|0|two|2|a dog|the dog|dog|an apple|dont know|don't know|1,000|1000|10.5|10 .5|u.s.|u.s
    |t-shirt|t shirt|black/white|black and white|black, white|black ,white|somebody'd|couldnt've|hed|he'd've|a|the|?
    |. . .|5:30|5.30|$5|5%|"stop"|stop|it's|its|whats|o'clock|oclock|twas|ten|TEN|eleven|new\tyork|new\nyork
    | new york |_|-|(1,2)|a,b|a, b|....................................x|@home|half-full|y'allll|'ow'sat
""".replace("\n    ", "").strip("\n").split("|")  # fmt: skip


def draw_answers(count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Return answers with those of ten people, who agree more or less; the first sets hold each chosen answer once."""
    random = Random(seed)
    return [_answers(random, _CHOSEN_ANSWERS[i % len(_CHOSEN_ANSWERS)]) for i in range(count)]


def _answers(random: Random, first: str) -> tuple[str, list[str]]:
    pool = [first, *random.choices(_CHOSEN_ANSWERS, k=random.randint(0, 3))]
    people = [_vary(random, random.choice(pool)) for _ in range(10)]
    return _vary(random, random.choice((first, *people))), people


def _vary(random: Random, answer: str) -> str:
    """Return an answer, now and then written in another way."""
    changes = (str.upper, str.title, lambda text: f"the {text}", lambda text: f"{text}.", lambda text: f"{text} ,")
    return random.choice(changes)(answer) if random.random() < 0.2 else answer


class Phrase(NamedTuple):
    """A phrase of a sentence: its words, its id, the true boxes, and those that a model gave, the best first."""

    words: str
    id: int
    truths: list[tuple[int, int, int, int]]
    boxes: list[tuple[float, float, float, float]]


def draw_sentences(count: int, seed: int) -> list[list[Phrase]]:
    """Return sentences, each of some phrases with boxes that are right, nearly right, or wrong."""
    random = Random(seed)
    ids = iter(range(10 * count))
    return [[_phrase(random, next(ids)) for _ in range(random.randint(1, 4))] for _ in range(count)]


def _phrase(random: Random, id: int) -> Phrase:
    truths = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        left, top = random.randint(0, 300), random.randint(0, 300)
        truths.append((left, top, left + random.randint(2, 120), top + random.randint(2, 120)))
    boxes = []
    for _ in range(random.randint(1, 3)):
        left, top, right, bottom = random.choice(truths)
        shift, grow = (
            random.choice((0, 0.2, 0.34, 0.5)) * (right - left),
            random.choice((0, 0, 0.5, 1)) * (bottom - top),
        )
        boxes.append((left + shift, float(top), right + shift, bottom + grow))
    return Phrase(random.choice(_THINGS).split()[0], id, truths, boxes)
