"""Fit what turns raw confidences into frequencies: a table for each kind of answer and each task."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from florence2.answers.answer import Answer
from florence2.answers.confidence import NO_CALIBRATION, Calibration, Table
from florence2.errors import OptionError
from florence2.pipeline import Florence2
from florence2.train.metrics import Pair, right_regions

LEAST = 50
"""The fewest rated regions or texts from which a table is made."""
_POINTS, _LEAST_EACH = 25, 20  # points of a table at most, and answers that each stands for at least
Rated: TypeAlias = tuple[float, bool]
"""A raw confidence, and whether the region or text was right."""


def without_calibration(f: Florence2) -> Florence2:
    """Return the model with raw confidences; it shares everything else."""
    return Florence2(f.model, f.processor.changed(calibration=NO_CALIBRATION), f.name, f._prepare)


def rate(pairs: Iterable[Pair]) -> dict[str, list[Rated]]:
    """Return the raw confidences of the answers of `pairs` with their rightness, by kind of answer and by task.

    A region is right when it overlaps an unmatched truth of the same label by an IoU of 0.5 or more, a text when it is
    the wanted one without white space around it.
    """
    rated: dict[str, list[Rated]] = defaultdict(list)
    for truth, answer in pairs:
        own = [(value, right) for value, right in _judge(truth, answer) if value is not None]
        rated[answer.kind] += own
        if answer.task.startswith("<"):
            rated[answer.task] += own
    return dict(rated)


def _judge(truth: Answer, answer: Answer) -> list[tuple[float | None, bool]]:
    if answer.kind == "text":
        return [(answer.confidence, truth.text.strip() == answer.text.strip())]
    shapes: list[Any] = [*answer.boxes, *answer.quads, *answer.polygons]
    return [(shape.confidence, right) for shape, right in zip(shapes, right_regions(truth, answer), strict=True)]


def fit(rated: Mapping[str, Sequence[Rated]]) -> Calibration:
    """Fit a table for each kind and task with at least LEAST rated answers.

    Raises OptionError when none has so many.
    """
    tables = {key: fit_table(rows) for key, rows in rated.items() if len(rows) >= LEAST}
    if not tables:
        most = max(map(len, rated.values()), default=0)
        raise OptionError(
            f"The answers hold at most {most} regions or texts of one kind, too few to calibrate; {LEAST} are needed."
        )
    return Calibration(tables)


def fit_table(rated: Sequence[Rated]) -> Table:
    """Fit an isotonic table (pool adjacent violators) through the frequencies of groups of similar raw values.

    Its ends differ from the outer groups by what one more right or wrong answer would change there: no answer is
    called certain, and none gets a confidence that no answer supports.
    """
    rows = sorted(rated)
    groups = [_Group(part) for part in np.array_split(np.array(rows, np.float64), _group_count(len(rows)))]
    pooled: list[_Group] = []
    for group in groups:
        pooled.append(group)
        while len(pooled) > 1 and not pooled[-2].is_below(pooled[-1]):
            last = pooled.pop()
            pooled[-1] = _Group(np.concatenate([pooled[-1].rows, last.rows]))
    points = [(group.raw, group.frequency) for group in pooled]
    if pooled[0].raw > 0:
        points.insert(0, (0.0, pooled[0].frequency_with(right=False)))
    if pooled[-1].raw < 1:
        points.append((1.0, pooled[-1].frequency_with(right=True)))
    return tuple(raw for raw, _ in points), tuple(frequency for _, frequency in points)


def _group_count(count: int) -> int:
    return max(1, min(_POINTS, count // _LEAST_EACH))


class _Group:
    """Rated answers (N, 2) with similar raw confidences: their mean, and the frequency of right ones among them."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows
        self.raw = min(1.0, float(rows[:, 0].mean()))
        self._right = float(rows[:, 1].sum())
        self.frequency = (self._right + 0.5) / (len(rows) + 1)  # never 0 or 1

    def frequency_with(self, right: bool) -> float:
        """Return the frequency after one more right or wrong answer."""
        return (self._right + right + 0.5) / (len(self.rows) + 2)

    def is_below(self, other: "_Group") -> bool:
        return self.raw < other.raw and self.frequency < other.frequency and self._share < other._share

    @property
    def _share(self) -> float:  # of groups without right answers, a small one has the higher frequency
        return self._right / len(self.rows)


def calibration_error(confidences: Sequence[float], right: Sequence[bool], groups: int = 10) -> float:
    """Return the expected calibration error: the mean gap of confidence and frequency, over equal parts of 0 to 1."""
    values, truths = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    part = np.minimum((values * groups).astype(int), groups - 1)
    gaps = [abs(values[part == i].sum() - truths[part == i].sum()) for i in range(groups)]
    return float(sum(gaps) / len(values)) if len(values) else 0.0


def separation(confidences: Sequence[float], right: Sequence[bool]) -> float | None:
    """Return the AUC: how often a right answer has a higher confidence than a wrong one; None without one of either."""
    values, truths = np.asarray(confidences, np.float64), np.asarray(right, bool)
    if truths.all() or not truths.any():
        return None
    wrong = np.sort(values[~truths])
    below, up_to = (np.searchsorted(wrong, values[truths], side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(wrong))
