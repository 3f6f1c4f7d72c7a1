"""Answers on a device against the recorded ones and against float32: how many are the same, and how far others part.

The recorded answers are those of Microsoft's code in float32 on a CPU. Where an answer in float16 or bfloat16 differs,
its margin says how much better than it the float32 model scores its own answer: a margin near zero is a choice between
equals. The score is that of the search, the summed log-probabilities over the length to the power of its penalty.
"""

import copy
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from florence2.inputs.tasks import split_prompt
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from florence2.train.samples import Sample
from parity.records import compare_model
from parity.report import Comparison, format_rows
from parity.specimen import SCENES, SCENES_SEED, read_records
from parity.ties import TokenCount, running_sums
from recipes.nano.exam import Exam

_AT_ONCE = 64
Ids = list[int]


@dataclass
class Agreement:
    """The answers to one task in one type: how many equal those of float32, and the margins of the others."""

    dtype: str
    task: str
    equal: int = 0
    total: int = 0
    margins: list[float] = field(default_factory=list)


def compare_recorded(device: str, runs: int | None) -> list[Comparison]:
    """Compare the stages and tokens of the recorded checkpoint, computed in float32 on `device`."""

    def move(model: Florence2Model) -> None:
        model.to(device)

    return list(compare_model(move, runs))


class Scenes:
    """The questions about nano's first scenes, and their answers by nano in any type on one device."""

    def __init__(self, f: Florence2, count: int):
        self.exact, self.count = f, min(count, SCENES)
        exam = Exam(SCENES_SEED, SCENES)
        self.samples: list[Sample] = [exam[index] for index in range(self.count)]

    def answers(self, f: Florence2) -> list[Ids]:
        """Return the ids of every answer, from the start id to the end id, answered in batches."""
        asked = [(prefix, sample.image) for sample in self.samples for prefix, _ in sample.pairs]
        return [list(answer.token_ids) for answer in f.run_batch(asked, batch_size=_AT_ONCE)]

    def compare_recorded(self, answers: Sequence[Ids]) -> TokenCount:
        """Count float32's answers that equal the recorded ones; ties within rounding count apart."""
        count = TokenCount()
        for (prefix, sample), mine, recorded in zip(self._asked(), answers, read_records(self.count), strict=True):
            count.add(self.exact.model, partial(self._memory, prefix, sample), [mine], [recorded])
        return count

    def compare(self, exact: Sequence[Ids], dtype: torch.dtype) -> list[Agreement]:
        """Answer in `dtype` and compare with float32's answers `exact`, task by task."""
        name = str(dtype).removeprefix("torch.")
        rounded = Florence2(copy.deepcopy(self.exact.model).to(dtype), self.exact.processor)
        by_task: dict[str, Agreement] = {}
        for (prefix, sample), mine, other in zip(self._asked(), exact, self.answers(rounded), strict=True):
            task, _ = split_prompt(prefix)
            assert task is not None
            row = by_task.setdefault(task.token, Agreement(name, task.token))
            row.total, row.equal = row.total + 1, row.equal + (mine == other)
            if mine != other:
                row.margins.append(self._margin(prefix, sample, mine, other))
        return list(by_task.values())

    def _asked(self) -> Iterator[tuple[str, Sample]]:
        return ((prefix, sample) for sample in self.samples for prefix, _ in sample.pairs)

    @torch.inference_mode()
    def _memory(self, prefix: str, sample: Sample) -> Tensor:
        image = self.exact.encode_image(sample.image)
        prompt = torch.tensor([self.exact.processor.prompt(prefix)], device=self.exact.model.device)
        return self.exact.model.encode(image.features, prompt)

    @torch.inference_mode()
    def _margin(self, prefix: str, sample: Sample, mine: Ids, other: Ids) -> float:
        memory, penalty = self._memory(prefix, sample), self.exact.options().length_penalty
        sums = [running_sums(self.exact.model, memory, ids) for ids in (mine, other)]
        scores: list[float] = [run[-1] / len(run) ** penalty for run in sums]
        return scores[0] - scores[1]


def format_agreement(rows: Sequence[Agreement]) -> str:
    """Format the agreement of every type and task as a table, with the sums of each type."""
    body = []
    for dtype in dict.fromkeys(row.dtype for row in rows):
        own = [row for row in rows if row.dtype == dtype]
        every = Agreement(dtype, "all", sum(row.equal for row in own), sum(row.total for row in own))
        every.margins = [margin for row in own for margin in row.margins]
        body += [[row.dtype, row.task, f"{row.equal} of {row.total}", *_margins(row.margins)] for row in (*own, every)]
    return format_rows(["type", "task", "as float32", "median margin", "largest margin"], body)


def _margins(margins: Sequence[float]) -> list[str]:
    return [f"{statistics.median(margins):.3f}", f"{max(margins):.3f}"] if margins else ["", ""]
