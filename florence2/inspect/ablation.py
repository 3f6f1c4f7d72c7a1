"""The table of an ablation sweep: one row for every part that was switched off."""

from dataclasses import dataclass, replace
from typing import Literal

from florence2.errors import OptionError
from florence2.inspect.table import Table, format_table


@dataclass(frozen=True)
class Ablation:
    """The effect of switching off one part.

    Attributes:
        name: The name that was patched.
        head: The head; None for a sub-layer or layer.
        drop: The fall of the log-probability of the unablated answers' tokens, in nats, averaged over all tokens that
            the model chose.
        words: The same over tokens of words only; None without any.
        locations: The same over location tokens only; None without any.
        shift: The number of bins (thousandths of the image's side) by which the most probable location moved, averaged
            over the places where the answers have one; None without any.
        by_request: The drop of each request.
        changed: The share of newly generated answers that differ in any token; None unless generated.
        moved: 1 - IoU of the unablated answers' boxes with the nearest boxes of the new answers; None without any.
        iou: The change of the mean IoU with the expected boxes; None unless they are given.
    """

    name: str
    head: int | None
    drop: float
    words: float | None
    locations: float | None
    shift: float | None
    by_request: tuple[float, ...]
    changed: float | None = None
    moved: float | None = None
    iou: float | None = None

    @property
    def part(self) -> str:
        """The part in words, for tables."""
        return self.name if self.head is None else f"{self.name.removesuffix('.heads')} head {self.head}"


Column = Literal["drop", "words", "locations", "shift", "changed", "moved", "iou"]
_COLUMNS: tuple[Column, ...] = ("drop", "words", "locations", "shift", "changed", "moved", "iou")


@dataclass(frozen=True)
class Sweep(Table):
    """The table of an ablation sweep.

    Attributes:
        rows: An `Ablation` for every part, in the order of computation until sorted.
        answers: The unablated answers, with their location tokens.
        logprob: The mean log-probability of their tokens, from which every drop is counted.
    """

    rows: tuple[Ablation, ...]
    answers: tuple[str, ...]
    logprob: float

    def sorted(self, by: Column = "drop") -> "Sweep":
        """Return the table with the most important parts first.

        Args:
            by: A column. Its largest values come first; for `iou`, which falls, the smallest.

        Returns:
            The sorted table.

        Raises:
            OptionError: The column does not exist or was not measured.
        """
        if by not in _COLUMNS:
            raise OptionError(f"Unknown column {by!r}. Known columns: {', '.join(_COLUMNS)}.")
        if any(getattr(row, by) is None for row in self.rows):
            raise OptionError(
                f"{by!r} was not measured in this sweep: either no answer has such tokens, or it was not requested."
            )
        return replace(self, rows=tuple(sorted(self.rows, key=lambda row: getattr(row, by), reverse=by != "iou")))

    def format(self, top: int | None = None) -> str:
        """Return the first `top` rows, or all, as aligned text, without columns that were not measured."""
        columns = [name for name in _COLUMNS if any(getattr(row, name) is not None for row in self.rows)]
        rows = [[row.part, *(_shown(getattr(row, name)) for name in columns)] for row in self.rows[:top]]
        return "\n".join(format_table([["part", *columns], *rows]))


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
