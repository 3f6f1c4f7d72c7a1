"""Odd values, and seeded ways to spoil bytes and JSON. Everything is drawn from a `random.Random`."""

import copy
import json
import re
from random import Random
from typing import Any

WORDS = (
    *(
        "",
        " ",
        "\n",
        "cat",
        "a red car",
        "Zürich",
        "日本語",
        "👩‍👩‍👧",
        "e\u0301",
        "\u202eabc",
        "\x00",
        "\ufeff",
        "\u2028",
    ),
    *("<OD>", "<CAPTION>", "<loc_5>", "<loc_1000>", "<loc_-1>", "<poly>", "<sep>", "<and>", "<s>", "</s>", "<pad>"),
    *("{input}", "{{x}}", "%s", "../../etc/passwd", "/dev/zero", "file:///etc/passwd", "http://127.0.0.1:9/x.png"),
    *("\ud800", "a\udcffb", "A" * 300, "<" * 50, "NaN", "null", "true", "-1", "1e999", "0x10", "__class__"),
)
_NUMBERS = (
    *(0, 1, -1, 2, 3, 7, 255, 256, 1000, 65535, 65536, 2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**40),
    *(-(2**63), 0.0, -0.0, 0.5, 1.5, -2.5, 1e-300, 1e-5, 1e20, 1e300, float("inf"), float("-inf"), float("nan")),
)
_HUGE = "@huge@"
"""Stands for an integer of 5,000 digits, which Python writes only if its limit is raised."""


def number(random: Random) -> Any:
    """A number of any kind; sometimes an integer beyond every float."""
    if random.random() < 0.1:
        return random.choice((1, -1)) * 10 ** random.choice((309, 400))
    return random.choice(_NUMBERS) if random.random() < 0.7 else random.randint(-1000, 1000)


def text(random: Random) -> str:
    """A text of odd words, or of any characters."""
    if random.random() < 0.7:
        return random.choice(("", " ", ",")).join(random.choice(WORDS) for _ in range(random.randint(1, 4)))
    return "".join(
        chr(random.choice((random.randrange(128), random.randrange(0x3000)))) for _ in range(random.randint(0, 30))
    )


def plain(random: Random, depth: int = 0) -> Any:
    """Any JSON value."""
    kind = random.randrange(7 if depth < 3 else 4)
    if kind == 0:
        return random.choice((None, True, False))
    if kind in (1, 2):
        return number(random)
    if kind == 3:
        return text(random)
    if kind in (4, 5):
        return [plain(random, depth + 1) for _ in range(random.choice((0, 1, 2, 3, 4, 4, 5)))]
    return {text(random): plain(random, depth + 1) for _ in range(random.randint(0, 3))}


class Odd:
    """An object of no use: neither a number nor a text nor a list."""

    def __repr__(self) -> str:
        return "Odd()"


def anything(random: Random) -> Any:
    """Any Python value, JSON or not."""
    kind = random.randrange(9)
    if kind < 5:
        return plain(random)
    if kind == 5:
        return text(random).encode("utf-8", "surrogatepass")
    if kind == 6:
        return tuple(plain(random) for _ in range(random.randint(0, 5)))
    if kind == 7:
        return random.choice((Odd(), object, len, ..., 1 + 2j, frozenset({1, 2}), range(4), bytearray(b"1234")))
    return {1: 2, None: plain(random)}


# ---- JSON ----------------------------------------------------------------------------------------------------------


def paths(values: Any, most: int = 400) -> list[tuple[Any, ...]]:
    """Every path into a JSON value, at most 50 entries of a list or object, and `most` in all."""
    found: list[tuple[Any, ...]] = []
    waiting: list[tuple[tuple[Any, ...], Any]] = [((), values)]
    while waiting and len(found) < most:
        path, value = waiting.pop(0)
        items = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ())
        for key, item in items[:50]:
            found.append((*path, key))
            waiting.append(((*path, key), item))
    return found


def get(values: Any, path: tuple[Any, ...]) -> Any:
    """The value at a path."""
    for key in path:
        values = values[key]
    return values


def change_json(random: Random, values: Any, times: int | None = None) -> Any:
    """A copy with one to three entries removed, replaced, renamed, moved or added."""
    values = copy.deepcopy(values)
    for _ in range(times or random.choice((1, 1, 1, 2, 3))):
        places = paths(values)
        if not places:
            return plain(random)
        *start, key = random.choice(places)
        _change_entry(random, get(values, tuple(start)), key)
    return values


def _change_entry(random: Random, parent: Any, key: Any) -> None:
    kind = random.randrange(8)
    if kind == 0:
        del parent[key]
    elif kind == 1 and isinstance(parent, dict):
        parent[text(random)] = parent.pop(key)
    elif kind == 2:
        other = random.choice(list(parent) if isinstance(parent, dict) else range(len(parent)))
        parent[key], parent[other] = parent[other], parent[key]
    elif kind == 3 and isinstance(parent, list):
        parent.insert(key, copy.deepcopy(random.choice(parent)))
    elif kind == 4 and isinstance(parent, dict):
        parent[random.choice(WORDS)] = plain(random)
    elif kind == 5 and isinstance(parent[key], int | float):
        parent[key] = random.choice((-parent[key], parent[key] + 1, parent[key] - 1, parent[key] * 2, 0.5))
    elif kind == 6:
        parent[key] = number(random)
    else:
        parent[key] = plain(random)


def to_json(random: Random, values: Any) -> bytes:
    """Write a JSON value, now and then in a form that few programs write."""
    written = json.dumps(values, ensure_ascii=random.random() < 0.5)
    kind = random.randrange(25)
    if kind == 0:
        return written.encode("utf-16", "replace")
    if kind == 1:
        return b"\xef\xbb\xbf" + written.encode("utf-8", "replace")
    if kind == 2:
        depth = random.choice((100, 2000, 100_000))
        return re.sub(r"\d+", "[" * depth + "]" * depth, written, count=1).encode("utf-8", "replace")
    if kind == 3:
        digits = "9" * random.choice((400, 5000, 100_000))
        return re.sub(r"(?<=[: \[])\d+", digits, written, count=1).encode("utf-8", "replace")
    if kind == 4:
        return change_bytes(random, written.encode("utf-8", "replace"))
    if kind == 5:  # a name twice: the last counts for Python
        return re.sub(r'^\{("[^"]+")', r"{\1: null, \1", written).encode("utf-8", "replace")
    return written.encode("utf-8", "surrogatepass")


# ---- bytes ---------------------------------------------------------------------------------------------------------


def change_bytes(random: Random, data: bytes, head: int = 1 << 12) -> bytes:
    """Flip, overwrite, cut, double or insert bytes; half of the time near the start, where the structure is."""
    spoilt = bytearray(data)
    for _ in range(random.choice((1, 1, 2, 4, 16))):
        size = len(spoilt)
        if not size:
            return bytes(random.randrange(256) for _ in range(20))
        at = random.randrange(min(size, head) if random.random() < 0.5 else size)
        kind = random.randrange(7)
        if kind <= 1:
            spoilt[at] ^= 1 << random.randrange(8)
        elif kind == 2:
            spoilt[at] = random.choice((0, 1, 127, 128, 255, 10, 34))
        elif kind == 3:
            spoilt[at : at + 8] = random.choice((b"\xff" * 8, b"\0" * 8, (2**62).to_bytes(8, "little")))
        elif kind == 4:
            del spoilt[at : at + random.choice((1, 2, 16, 1000, size))]
        elif kind == 5:
            spoilt[at:at] = spoilt[at : at + random.choice((1, 8, 100))]
        else:
            spoilt[at:at] = bytes(random.randrange(256) for _ in range(random.randint(1, 8)))
    return bytes(spoilt)
