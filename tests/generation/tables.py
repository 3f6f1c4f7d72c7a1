"""Both searches over tables of logits: that of the package on tensors, and that of `florence2.lite` on arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from florence2.generation.options import GenerationOptions, SpecialIds
from florence2.generation.search import search
from florence2.generation.state import Generation
from florence2.lite.search.search import Hypothesis
from florence2.lite.search.search import search as search_arrays
from tests.slow_search import Table

START, END, PAD = 0, 1, 2
IDS = SpecialIds(start=START, end=END, pad=PAD)
Run = Callable[..., Generation]
"""(tables, options[, ids]) -> the answers over tables, one table an input."""


def run_on_tensors(
    tables: list[Table], options: GenerationOptions, ids: SpecialIds = IDS, with_keep: bool = True
) -> Generation:
    """Search over tables, one per input, remembering what every beam has said, as a model's cache would."""
    K = options.num_beams
    past: list[list[list[int]]] = [[[] for _ in range(K)] for _ in tables]

    def step(newest: Tensor) -> Tensor:
        rows = []
        for b, table in enumerate(tables):
            for k in range(K):
                past[b][k] = [*past[b][k], int(newest[b * K + k])]
                rows.append(table(past[b][k]))
        return torch.tensor(rows, dtype=torch.float32)

    def reorder(parents: Tensor) -> None:
        for b in range(len(tables)):
            past[b] = [past[b][int(k)] for k in parents[b]]

    def keep(rows: Tensor) -> None:
        past[:], tables[:] = [past[b] for b in rows], [tables[b] for b in rows]

    tables = list(tables)
    return search(step, reorder, len(tables), options, ids, keep=keep if with_keep else None)


def run_on_arrays(tables: list[Table], options: GenerationOptions, ids: SpecialIds = IDS) -> Generation:
    """Do the same with the NumPy search."""
    K = options.width
    past: list[list[int]] = [[] for _ in range(K * len(tables))]
    running = list(tables)

    def step(newest: Any) -> Any:
        past[:] = [[*row, int(id)] for row, id in zip(past, newest, strict=True)]
        return np.array([running[row // K](said) for row, said in enumerate(past)], dtype=np.float32)

    def reorder(parents: Any, kept: Any) -> None:
        past[:], running[:] = [past[int(row)] for row in parents], [running[int(place)] for place in kept]

    found = search_arrays(step, reorder, len(tables), options, ids)
    return as_generation([each for answers in found for each in answers], ids)


def as_generation(found: list[Hypothesis], ids: SpecialIds) -> Generation:
    """Return hypotheses in the form of the other search, padded."""
    lengths = torch.tensor([len(each.ids) - 1 for each in found])
    sequences = torch.full((len(found), 1 + int(lengths.max())), ids.pad)
    logprobs = torch.zeros(len(found), int(lengths.max()))
    for row, each in enumerate(found):
        sequences[row, : len(each.ids)] = torch.from_numpy(each.ids)
        logprobs[row, : len(each.logprobs)] = torch.from_numpy(each.logprobs)
    scores = torch.tensor([each.score for each in found])
    return Generation(sequences, logprobs, scores, lengths, tuple(each.finish_reason for each in found))
