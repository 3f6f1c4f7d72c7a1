"""Patterns of names: which names a trace keeps or a patch changes, and a warning about those that never occurred."""

import difflib
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from florence2.errors import OptionError
from florence2.model.config import Florence2Config
from florence2.tracing.names import Name, names_of, starred


class NotRecordedWarning(UserWarning):
    """Runs took place in a `trace` or `patched` block, but none of them computed a value that the block names."""


class Selection:
    """The names that one trace keeps of a checkpoint's runs."""

    def __init__(self, config: Florence2Config, patterns: Iterable[str], pixel_shape: Sequence[int]):
        """`pixel_shape` (1, 3, H, W) is assumed for an EncodedImage that was made before the block."""
        self.config, self.pixel_shape = config, tuple(pixel_shape)
        self.known = {name.name: name for name in names_of(config)}
        self.by_pattern = select(patterns, list(self.known.values()))
        """The names that each pattern selects."""
        chosen = {name for names in self.by_pattern.values() for name in names}
        self.names = [name for name in self.known.values() if name.name in chosen or name.searched]
        """The selected names and those of the search, in the order of computation."""

    def find(self, name: str) -> Name:
        """Return the entry of one name. Raises OptionError, with the nearest names, when it does not exist."""
        select([name], list(self.known.values()), exactly=True)
        if name not in self.known:
            raise OptionError(f"{name!r} is a pattern; ask for one name at a time.")
        return self.known[name]


def select(patterns: Iterable[str], names: Sequence[Name], exactly: bool = False) -> dict[str, list[str]]:
    """Return, for each pattern, the names that it selects.

    In a pattern `*` is one part between dots, or some of it, and `**` any number of parts. It selects the names that it
    matches and those below them: `decoder.layers.0.cross_attention` includes its weights. With "=" before it, or
    `exactly`, it selects only what it matches. Raises OptionError, with the nearest names, for a pattern that selects
    nothing.
    """
    selected: dict[str, list[str]] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        if not isinstance(pattern, str):
            raise OptionError(f"A name or pattern is text, such as 'decoder.layers.*', not {str(pattern)[:60]!r}.")
        alone = exactly or pattern.startswith("=")
        plain = pattern.removeprefix("=")
        parts = plain.split(".")
        selected[pattern] = [name.name for name in names if _matches(parts, name.name.split("."), alone)]
        if not selected[pattern]:
            raise OptionError(_unknown(plain, names, alone))
    return selected


def _matches(pattern: Sequence[str], parts: Sequence[str], alone: bool) -> bool:
    if not pattern:
        return not parts or not alone
    if pattern[0] == "**":
        return any(_matches(pattern[1:], parts[skip:], alone) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(pattern[1:], parts[1:], alone)


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
        "florence2.inspect.describe_names(config) lists every name."
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
