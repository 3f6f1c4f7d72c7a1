"""Group the rows of a micro-batch by length, so that little of what the text model computes is padding.

Batches stay what the shuffled order makes them: only rows of one micro-batch are computed apart. So the order of the
data, the number of processes and of workers, and a resumed run need no rule of their own. Grouping whole samples could
not do it: the questions about one image differ in length too.
"""

from collections.abc import Sequence
from dataclasses import dataclass

PADDING = 0.1
"""The largest share of padding among the positions of memory and answers."""


@dataclass(frozen=True)
class RowGroup:
    """The `rows` that are encoded together, and in which groups their `answers` are decoded; rows count from 0."""

    rows: list[int]
    answers: list[list[int]]


def group_rows(prompts: Sequence[int], answers: Sequence[int], image_tokens: int) -> list[RowGroup]:
    """Group rows by the lengths of their `prompts`, and within such a group by those of their `answers`.

    At most PADDING of all positions is padding. Rows are not split where that holds without: each group costs the start
    of a few kernels.
    """
    images = len(prompts) * image_tokens
    padding = len(prompts) * (max(prompts) + max(answers)) - sum(prompts) - sum(answers)
    if padding <= PADDING * (padding + images + sum(prompts) + sum(answers)):
        encoded = [list(range(len(prompts)))]
    else:  # half for the prompts, so that answers need not be all alike
        encoded = split_rows(prompts, images, share=PADDING / 2)
    memory = images + _computed(prompts, encoded)
    decoded = split_rows(answers, memory, encoded, padding=memory - images - sum(prompts))
    owner = {row: index for index, rows in enumerate(encoded) for row in rows}
    groups = [RowGroup(sorted(rows), []) for rows in encoded]
    for rows in decoded:
        groups[owner[rows[0]]].answers.append(rows)
    return groups


def split_rows(
    lengths: Sequence[int],
    others: int = 0,
    groups: Sequence[Sequence[int]] | None = None,
    *,
    padding: int = 0,
    share: float | None = None,
) -> list[list[int]]:
    """Split rows by length, so that padding is at most a share of all positions, `others` included.

    Args:
        lengths: The number of positions of each row.
        others: Positions that are computed besides these, such as those of the memory.
        groups: Rows that are apart already; None where all are together.
        padding: How many of `others` are padding, at most `share` of them.
        share: The largest share of padding; None is PADDING.

    Returns:
        The rows of each group, the longest first; as few groups as splits at the best place give.
    """
    share = PADDING if share is None else share
    split = [sorted(rows, key=lambda row: (-lengths[row], row)) for rows in groups or [range(len(lengths))]]
    while True:
        computed = _computed(lengths, split)
        if padding + computed - sum(lengths) <= share * (computed + others):
            return split
        saved, index, place = max(_best_split(lengths, rows, index) for index, rows in enumerate(split))
        assert saved > 0, "padding is left only where lengths differ"
        split[index : index + 1] = [split[index][:place], split[index][place:]]


def _computed(lengths: Sequence[int], groups: Sequence[Sequence[int]]) -> int:
    """Return how many positions groups have, each as wide as its longest row, which is the first."""
    return sum(len(rows) * lengths[rows[0]] for rows in groups)


def count_positions(prompts: Sequence[int], answers: Sequence[int], image_tokens: int) -> tuple[int, int]:
    """Return how many positions the text model computes for a micro-batch, and how many of them are padding.

    `prompts` and `answers` are the lengths of each pair; every pair has `image_tokens` in addition.
    """
    computed = 0
    for group in group_rows(prompts, answers, image_tokens):
        computed += len(group.rows) * (image_tokens + max(prompts[row] for row in group.rows))
        computed += _computed(answers, group.answers)
    real = len(prompts) * image_tokens + sum(prompts) + sum(answers)
    return computed, computed - real


def _best_split(lengths: Sequence[int], group: Sequence[int], index: int) -> tuple[int, int, int]:
    """Return (positions saved, index, place) of the best place to split a group, whose longest row is the first."""
    longest, count = lengths[group[0]], len(group)
    return max((((longest - lengths[row]) * (count - place), index, place) for place, row in enumerate(group)))
