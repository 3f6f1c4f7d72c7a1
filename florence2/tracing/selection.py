"""Patterns of names: which names a trace keeps or a patch changes, and a warning about those that never occurred.

The table of names knows the modules of this package. A pattern may also select names that only a module of your own
records, if the block is made with `unknown="allow"`; their shapes are then those of the values.
"""

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, get_args

from torch import Tensor

from florence2.errors import OptionError, shown
from florence2.model.config import Florence2Config
from florence2.tracing.names import Name, When, names_of, starred

Unknown = Literal["refuse", "allow"]
"""What to do about a pattern that selects no name of the table: refuse it, or wait for a module to record it."""


class NotRecordedWarning(UserWarning):
    """Runs took place in a `trace` or `patched` block, but none of them computed a value that the block names."""


class Selection:
    """The names that one trace keeps of a checkpoint's runs."""

    def __init__(
        self,
        config: Florence2Config,
        patterns: Iterable[str],
        usual_size: tuple[int, int],
        unknown: Unknown = "refuse",
    ):
        """`usual_size` (H, W) is assumed for an EncodedImage that was made before the block."""
        self.config, self.usual_size = config, usual_size
        self.known = {name.name: name for name in names_of(config)}
        self.by_pattern = select(patterns, list(self.known.values()), unknown=unknown)
        """The names of the table that each pattern selects."""
        self.open = OpenPatterns(self.by_pattern if unknown == "allow" else (), self.known)
        chosen = {name for names in self.by_pattern.values() for name in names}
        self.names = [name for name in self.known.values() if name.name in chosen or name.searched]
        """The selected names and those of the search, in the order of computation."""

    def find(self, name: str) -> Name:
        """Return the entry of one name. Raises OptionError, with the nearest names, when it does not exist."""
        select([name], list(self.known.values()), exactly=True)
        if name not in self.known:
            raise OptionError(f"{name!r} is a pattern; ask for one name at a time.")
        return self.known[name]


class OpenPatterns:
    """Patterns that select names which the table does not have, as soon as a run records them."""

    def __init__(self, patterns: Iterable[str], known: Collection[str], exactly: bool = False):
        self._patterns = {pattern: pattern.removeprefix("=").split(".") for pattern in patterns}
        self._alone = {pattern: exactly or pattern.startswith("=") for pattern in self._patterns}
        self._known = known
        self._matching: dict[str, tuple[str, ...]] = {}
        self._entered: dict[str, bool] = {}

    def matching(self, name: str) -> tuple[str, ...]:
        """Return the patterns that select `name`; none for a name of the table or of the search."""
        if name not in self._matching:
            parts, closed = name.split("."), name in self._known or name.startswith("search.")
            self._matching[name] = tuple(
                pattern
                for pattern, wanted in self._patterns.items()
                if not closed and _matches(wanted, parts, self._alone[pattern])
            )
        return self._matching[name]

    def enters(self, prefix: str) -> bool:
        """Return whether a pattern may select a name below `prefix`."""
        if prefix not in self._entered:
            parts = prefix.split(".")
            self._entered[prefix] = any(
                _may_match_below(wanted, parts, self._alone[pattern]) for pattern, wanted in self._patterns.items()
            )
        return self._entered[prefix]

    def complete(self, selected: Mapping[str, Sequence[str]], recorded: Iterable[str]) -> dict[str, list[str]]:
        """Return the names that each pattern selects, in the table or among those that were recorded."""
        found = {pattern: list(names) for pattern, names in selected.items()}
        for name in recorded:
            for pattern in self.matching(name):
                found[pattern].append(name)
        return found


@dataclass(frozen=True)
class CallSizes:
    """The sizes of one call: a batch of B images or prompts, K beams, S positions of the memory, padding included."""

    batch: int
    beams: int = 1
    positions: int = 0


def name_value(name: str, value: Tensor, when: When, sizes: CallSizes) -> Name:
    """Return the entry of a value that the table does not have.

    Its first dimension counts the batch (of a step: B or B·K), its second may be the 1 of a single position, and
    before the last dimension of a value of the memory come S positions; other dimensions are called x1, x2, ...
    """
    shape = tuple(value.shape)
    numbers = {f"x{dim}": size for dim, size in enumerate(shape)}
    letters, rows = list(numbers), sizes.batch * sizes.beams
    # with one beam B and B·K are equal; streams (B·K, 1, D) and scores (B·K, V) have few dimensions, heads have four
    streams = rows != sizes.batch or len(shape) < 4 or shape[1] == 1
    if when == "step" and shape[:1] == (rows,) and streams:
        letters[0] = "B·K"
        letters[1:2] = ["1"] if shape[1:2] == (1,) else letters[1:2]
    elif shape and shape[0] % sizes.batch == 0:
        numbers["x0"] = shape[0] // sizes.batch
        letters[0] = "B" if numbers["x0"] == 1 else "B·x0"
        if when in ("prompt", "answer") and len(shape) == 3 and shape[1] == sizes.positions:
            letters[1] = "S"
    text = "a value that the table of names does not have"
    return Name(name, tuple(letters), text, when, "model", tuple(numbers.items()))


def select(
    patterns: Iterable[str], names: Sequence[Name], exactly: bool = False, unknown: Unknown = "refuse"
) -> dict[str, list[str]]:
    """Return, for each pattern, the names that it selects.

    In a pattern `*` is one part between dots, or some of it, and `**` any number of parts. It selects the names that it
    matches and those below them: `decoder.layers.0.cross_attention` includes its weights. With "=" before it, or
    `exactly`, it selects only what it matches. Raises OptionError, with the nearest names, for a pattern that selects
    nothing, unless `unknown` is "allow".
    """
    if unknown not in get_args(Unknown):
        raise OptionError(f'unknown is {shown(unknown)}; it must be "refuse" or "allow".')
    selected: dict[str, list[str]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"A name or pattern is text, such as 'decoder.layers.*', not {str(pattern)[:60]!r}.")
        alone = exactly or pattern.startswith("=")
        plain = pattern.removeprefix("=")
        parts = plain.split(".")
        selected[pattern] = [name.name for name in names if _matches(parts, name.name.split("."), alone)]
        if not selected[pattern] and unknown == "refuse":
            raise OptionError(_unknown(plain, names, alone))
    return selected


def _matches(pattern: Sequence[str], parts: Sequence[str], alone: bool) -> bool:
    if not pattern:
        return not parts or not alone
    if pattern[0] == "**":
        return any(_matches(pattern[1:], parts[skip:], alone) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:], alone)


def _may_match_below(pattern: Sequence[str], prefix: Sequence[str], alone: bool) -> bool:
    """Return whether the pattern matches some name that begins with `prefix` and has more parts."""
    if not prefix or not pattern:
        return bool(pattern) or not alone
    if pattern[0] == "**":
        return True
    return fnmatchcase(prefix[0], pattern[0]) and _may_match_below(pattern[1:], prefix[1:], alone)


def _unknown(pattern: str, names: Sequence[Name], alone: bool) -> str:
    """Explain why a pattern selects nothing, and name what does exist."""
    parts = pattern.split(".")
    if alone and any(_matches(parts, name.name.split("."), False) for name in names):
        return (
            f"{pattern!r} has no value of its own, only names below it: {pattern}.** selects all of them. "
            "florence2.inspect.describe_names(config) lists every name."
        )
    known = {name.name for name in names}
    if not alone:  # a module without a value of its own still selects the names below it
        known |= prefixes(known)
    near = difflib.get_close_matches(pattern, sorted(known | set(map(starred, known))), n=4, cutoff=0.5)
    nearest = f"The nearest names are {', '.join(near)}" if near else "No name is similar"
    return (
        f"No intermediate value of this checkpoint is called {pattern!r}. {nearest}; "
        "florence2.inspect.describe_names(config) lists every name, "
        'and unknown="allow" accepts those that a module of your own records.'
    )


def prefixes(names: Iterable[str]) -> set[str]:
    """Return the paths of all modules that the names are below."""
    return {".".join(parts[:end]) for parts in (name.split(".") for name in names) for end in range(1, len(parts))}


def warn_not_recorded(
    block: str, selected: Mapping[str, Sequence[str]], recorded: Collection[str], stacklevel: int
) -> None:
    """Warn when patterns of a block (a "trace" or "patch") select only names that none of its runs recorded."""
    unused = [pattern for pattern, names in selected.items() if not any(name in recorded for name in names)]
    if unused:
        effect = "keeps nothing" if block == "trace" else "changed nothing"
        warnings.warn(
            f"The {block} of {', '.join(map(repr, unused))} {effect}: no run in its block recorded that name. Either "
            "the image was encoded before the block, the rule that the name belongs to is off, or a module was "
            "replaced by one that does not record it.",
            NotRecordedWarning,
            stacklevel=stacklevel + 1,
        )
