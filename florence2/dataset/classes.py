"""From the labels that a model writes to the numbered classes of a dataset; a label that fits none is never lost."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from florence2.errors import OptionError, shown

Unmatched = Literal["keep", "drop", "error"]
MAX_CLASSES_BYTES = 1 << 20
_IRREGULAR = {
    "child": "children",
    "foot": "feet",
    "goose": "geese",
    "man": "men",
    "mouse": "mice",
    "person": "people",
    "tooth": "teeth",
    "woman": "women",
}
_F_WORDS = ("calf", "half", "knife", "leaf", "loaf", "scarf", "shelf", "wife", "wolf")


class Classes:
    """The classes of one view, by number from 0, and how the labels were matched.

    Attributes:
        names: The classes: those given, then the labels that fit none of them, as they come.
        labels: The labels, with their numbers of regions.
    """

    def __init__(self, given: Sequence[str] | None = None, unmatched: Unmatched = "keep"):
        """Match labels to the `given` classes; None makes a class of every label, in the order in which they come."""
        self.names = list(given or ())
        self.given, self.policy = given is not None, unmatched
        self.labels: Counter[str] = Counter()
        self._known: dict[str, tuple[int | None, str]] = {}
        self._steps = _steps(self.names)

    def number(self, label: str) -> int | None:
        """Return the number of a label's class, or None for one to leave out.

        Raises OptionError for a label without a class where such are an error.
        """
        known = self._known.get(label)
        if known is None:
            known = self._known[label] = self._match(label)
        self.labels[label] += 1
        return known[0]

    @property
    def counts(self) -> Counter[str]:
        """The number of regions by the way in which their labels matched."""
        counts: Counter[str] = Counter()
        for label, count in self.labels.items():
            counts[self._known[label][1]] += count
        return counts

    @property
    def unmatched(self) -> dict[str, int]:
        """The labels that fit none of the given classes, with their numbers of regions."""
        return {label: count for label, count in self.labels.items() if self._known[label][1] == "unmatched"}

    def _match(self, label: str) -> tuple[int | None, str]:
        for step, find in self._steps:
            if (number := find(label)) is not None:
                return number, step
        if self.given and self.policy == "error":
            raise OptionError(
                f"The label {shown(label)} fits none of the {len(self.names)} classes of --classes. Add it to the "
                "file, or give --unmatched keep or drop."
            )
        if self.given and self.policy == "drop":
            return None, "unmatched"
        self.names.append(label)
        return len(self.names) - 1, "unmatched" if self.given else "exact"

    def report(self) -> dict[str, Any]:
        """Return the counts as plain JSON values; the most frequent labels come first."""
        report: dict[str, Any] = {"names": self.names, "labels": _by_frequency(self.labels)}
        if self.given:
            counts = self.counts
            report["matched"] = {step: counts[step] for step in ("exact", "case", "plural", "unmatched")}
            report["unmatched"] = _by_frequency(self.unmatched)
        return report


def _by_frequency(labels: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(labels.items(), key=lambda item: (-item[1], item[0])))


def read_classes(path: Path) -> list[str]:
    """Read a file with the name of one class a line.

    Raises:
        OptionError: The file cannot be read, is larger than `MAX_CLASSES_BYTES`, holds no name, or one twice.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_CLASSES_BYTES + 1)
        if len(content) > MAX_CLASSES_BYTES:
            raise OptionError(f"{path} is larger than {MAX_CLASSES_BYTES >> 20} MiB; give one class a line.")
        names = [line.strip() for line in content.decode("utf-8-sig").splitlines()]
    except OSError as error:
        raise OptionError(f"{path} cannot be read: {error.strerror}. Give a file with one class a line.") from None
    except UnicodeDecodeError:
        raise OptionError(f"{path} is not text in UTF-8; give a file with one class a line.") from None
    lines: dict[str, int] = {}
    for number, name in enumerate(names, 1):
        if name in lines and name:
            raise OptionError(f"{path} has the class {shown(name)} on lines {lines[name]} and {number}.")
        lines.setdefault(name, number)
    classes = [name for name in names if name]
    if not classes:
        raise OptionError(f"{path} holds no class; write one a line.")
    return classes


def _steps(names: Sequence[str]) -> list[tuple[str, Callable[[str], int | None]]]:
    """Return the ways to match a label, the strictest first."""
    exact = {name: i for i, name in enumerate(names)}
    plain: dict[str, int] = {}
    plural: dict[str, int] = {}
    for i, name in enumerate(names):
        plain.setdefault(_plain(name), i)
    for i, name in enumerate(names):
        for form in _plurals(_plain(name)):
            plural.setdefault(form, i)

    def by_plural(label: str) -> int | None:
        word = _plain(label)
        return plural.get(word, next((plain[form] for form in _plurals(word) if form in plain), None))

    return [("exact", exact.get), ("case", lambda label: plain.get(_plain(label))), ("plural", by_plural)]


def _plain(label: str) -> str:
    return " ".join(label.casefold().split())


def _plurals(phrase: str) -> list[str]:
    """Return the forms in which the last word of a phrase may be a plural."""
    head, space, word = phrase.rpartition(" ")
    forms = [f"{word}s", f"{word}es"]
    if word.endswith("y"):
        forms.append(f"{word[:-1]}ies")
    if word.endswith(_F_WORDS):
        forms.append(f"{word.removesuffix('e').removesuffix('f')}ves")
    forms += [word.removesuffix(one) + many for one, many in _IRREGULAR.items() if word.endswith(one)]
    return [head + space + form for form in forms]
