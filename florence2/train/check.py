"""Dry run over training data, without a model: find what would stop the training, be cut, or not be read back."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

from florence2.errors import Florence2Error, shown
from florence2.inputs.image import ImageInput, open_image
from florence2.inputs.tasks import check_prompt, find_task
from florence2.processor import Processor
from florence2.train.entries import LISTED, check_text
from florence2.train.roundtrip import check_answer
from florence2.train.samples import Samples

Fault = Literal["unreadable", "refused", "lost", "cut"]


@dataclass(frozen=True)
class SampleFault:
    """One problem of an image or an answer: the sample's name, which of the four faults, and a sentence."""

    name: str
    fault: Fault
    text: str


@dataclass(frozen=True)
class TaskCheck:
    """Counts of one task: its answers, the lost and cut ones, and the numbers of ids with `<s>` and `</s>`."""

    task: str
    answers: int
    lost: int
    cut: int
    median: float
    longest: int


@dataclass(frozen=True)
class CheckReport:
    """The result of `check_samples`. `str()` gives a table for people, with the first twenty findings."""

    images: int
    answers: int
    tasks: tuple[TaskCheck, ...]
    findings: tuple[SampleFault, ...]

    @property
    def unreadable(self) -> int:
        """Return the number of images that cannot be read; training would stop there."""
        return self._count("unreadable")

    @property
    def refused(self) -> int:
        """Return the number of prompts that are refused or too long; training would stop there."""
        return self._count("refused")

    @property
    def lost(self) -> int:
        """Return the number of answers that would not be read back as they were written."""
        return self._count("lost")

    @property
    def cut(self) -> int:
        """Return the number of answers that are too long; training would not see their end."""
        return self._count("cut")

    def _count(self, fault: Fault) -> int:
        return sum(finding.fault == fault for finding in self.findings)

    def __str__(self) -> str:
        width = max(len(name) for name in ("task", *(task.task for task in self.tasks)))
        lines = [f"{'task':{width}}  answers     lost      cut  median ids  longest"]
        lines += [
            f"{t.task:{width}}  {t.answers:7,}  {t.lost:7,}  {t.cut:7,}  {t.median:10,g}  {t.longest:7,}"
            for t in self.tasks
        ]
        lines.append(f"{_counted(self.answers, 'answer')} on {_counted(self.images, 'image')}: {self._verdict()}")
        lines += [f"{finding.fault}: {finding.name}: {finding.text}" for finding in self.findings[:LISTED]]
        if len(self.findings) > LISTED:
            lines.append(f"... and {len(self.findings) - LISTED:,} more")
        return "\n".join(lines)

    def _verdict(self) -> str:
        if not self.findings:
            return "nothing is lost or cut."
        return (
            f"{self.lost:,} lost in part, {self.cut:,} cut, {_counted(self.refused, 'prompt')} refused, "
            f"{_counted(self.unreadable, 'image')} unreadable."
        )


@dataclass(frozen=True)
class _Pair:
    """One answer: its task, its number of ids, and its faults, each at most once."""

    task: str
    length: int
    faults: dict[Fault, str]


def check_samples(
    samples: Samples, processor: Processor, max_length: int, max_prompt: int | None = None
) -> CheckReport:
    """Read every image, and send every answer through tokenizer and parser and back.

    Args:
        samples: The data. An image file that several samples share is read once.
        processor: The processor of the model to be trained.
        max_length: The most ids an answer may have: the model's positions.
        max_prompt: The most ids a prompt may have: the positions that image tokens leave. None for any.
    """
    findings: list[SampleFault] = []
    pairs: list[_Pair] = []
    opened: set[str] = set()
    for index in range(len(samples)):
        sample = samples[index]
        name = sample.name or f"sample {index}"
        key = os.fspath(sample.image) if isinstance(sample.image, str | os.PathLike) else f"sample {index}"
        reason = None if key in opened else _why_unreadable(sample.image)
        opened.add(key)
        if reason:
            findings.append(SampleFault(name, "unreadable", reason))
        for prefix, suffix in sample.pairs:
            pair = _check_pair(prefix, suffix, processor, max_length, max_prompt)
            findings += [SampleFault(name, fault, f"{shown(prefix)}: {text}") for fault, text in pair.faults.items()]
            pairs.append(pair)
    return CheckReport(len(opened), len(pairs), _by_task(pairs), tuple(findings))


def _why_unreadable(image: ImageInput) -> str | None:
    try:
        open_image(image)
    except Florence2Error as error:
        return str(error)
    return None


def _check_pair(prefix: str, suffix: str, processor: Processor, max_length: int, max_prompt: int | None) -> _Pair:
    faults: dict[Fault, str] = {}
    try:
        check_prompt(prefix, tasks=processor.tasks)
        check_text("the prompt", prefix)
        prompt_length = len(processor.prompt(prefix))
        if max_prompt is not None and prompt_length > max_prompt:
            faults["refused"] = f"the prompt has {prompt_length} ids, but at most {max_prompt} fit; make it shorter."
    except Florence2Error as error:
        faults["refused"] = str(error)
    length = 0
    try:
        ids = processor.encode(suffix)
        length = len(ids)
        if length > max_length:
            faults["cut"] = f"the answer has {length} ids, but at most {max_length} fit; ask for less at a time."
        check_answer(prefix, suffix, ids, processor)
    except Florence2Error as error:
        faults["lost"] = str(error)
    task = find_task(prefix, processor.tasks)
    return _Pair(task.token if task else "(free prompt)", length, faults)


def _by_task(pairs: Sequence[_Pair]) -> tuple[TaskCheck, ...]:
    """Make one row for each task, in the order of their first answers."""
    grouped: dict[str, list[_Pair]] = {}
    for pair in pairs:
        grouped.setdefault(pair.task, []).append(pair)
    return tuple(_summary(task, own) for task, own in grouped.items())


def _summary(task: str, pairs: Sequence[_Pair]) -> TaskCheck:
    lengths = [pair.length for pair in pairs]
    lost, cut = (sum(fault in pair.faults for pair in pairs) for fault in ("lost", "cut"))
    return TaskCheck(task, len(pairs), lost, cut, median(lengths), max(lengths))


def _counted(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
