"""Compare nano's tokens on synthetic scenes, for all tasks: a trained checkpoint, whose answers mean something.

`python -m parity.specimen --code DIR` records the tokens of Microsoft's code, from the folder of its .py files.
"""

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.hub import EMBEDDED_MODEL, resolve
from florence2.loading import load
from florence2.pipeline import Florence2
from florence2.train.samples import Sample
from parity.compare import MakeReference
from parity.recipe import GOLDEN
from parity.references import Reference, Remote
from parity.report import Comparison
from parity.ties import TokenCount
from recipes.nano.exam import Exam

RECORDS = GOLDEN / "nano.npz"
SCENES_SEED, SCENES = 4, 200


def compare_specimen(
    group: str, make_reference: MakeReference, f: Florence2, answers: list[list[int]], count: int
) -> Iterator[Comparison]:
    """Compare nano's `answers` to `count` images with a live reference's tokens, with the checkpoint's own settings."""
    folder = resolve(EMBEDDED_MODEL)
    reference = make_reference(folder, load_model(folder), torch.float32)
    theirs = [ids for index in range(count) for ids in _reference_answers(reference, f, index)]
    yield _row(f, group, reference.name, f"tokens, {count} images x all tasks", answers[: len(theirs)], theirs)


def compare_specimen_records(f: Florence2, answers: list[list[int]], count: int) -> Iterator[Comparison]:
    """Compare the `answers` of nano with the recorded tokens of Microsoft's code, and those to `count` images again."""
    yield _row(f, "records", "records", f"tokens, {SCENES} images x all tasks", answers, read_records(SCENES))
    threads = torch.get_num_threads()
    by_threads = []
    try:
        for thread_count in (1, 2):
            torch.set_num_threads(thread_count)
            by_threads.append(answer_one_by_one(f, count))
    finally:
        torch.set_num_threads(threads)
    cases = f"{count} images x all tasks"
    yield _row(f, "records", "itself", f"1 thread and 2, {cases}", *by_threads)
    yield _row(f, "records", "itself", f"batches of 1 and of 8, {cases}", by_threads[1], answer_in_batches(f, count))


def answer_one_by_one(f: Florence2, count: int) -> list[list[int]]:
    """Return the ids of every answer on the first `count` scenes, from the start id to the end id."""
    rows = []
    for sample in _samples(count):
        image = f.encode_image(sample.image)
        rows += [list(f.run(prefix, image).token_ids) for prefix, _ in sample.pairs]
    return rows


def answer_in_batches(f: Florence2, count: int, size: int = 8) -> list[list[int]]:
    """Return the same ids, computed in batches of random images and tasks."""
    requests = [(prefix, sample.image) for sample in _samples(count) for prefix, _ in sample.pairs]
    order = random.Random(0).sample(range(len(requests)), len(requests))
    answers = dict(zip(order, f.run_batch([requests[i] for i in order], batch_size=size), strict=True))
    return [list(answers[i].token_ids) for i in range(len(requests))]


def read_records(count: int) -> list[list[int]]:
    """Return the recorded ids of Microsoft's code on the first `count` images."""
    stored = np.load(RECORDS)
    ends = np.cumsum(stored["lengths"])
    rows = np.split(stored["ids"].astype(int), ends[:-1])
    answers = int(stored["answers"][:count].sum())
    return [row.tolist() for row in rows[:answers]]


def record(code: Path, count: int = SCENES) -> None:
    """Run Microsoft's code and write `RECORDS`."""
    folder = resolve(EMBEDDED_MODEL)
    f, reference = load(folder, device="cpu"), Remote(folder, code, torch.float32)
    lengths, ids, answers = [], [], []
    for index in range(count):
        rows = list(_reference_answers(reference, f, index))
        answers.append(len(rows))
        lengths += [len(row) for row in rows]
        ids += [id for row in rows for id in row]
        print(f"{index + 1} of {count}", file=sys.stderr)
    np.savez_compressed(
        RECORDS,
        ids=np.array(ids, np.uint16),
        lengths=np.array(lengths, np.uint16),
        answers=np.array(answers, np.uint8),
    )


def _reference_answers(reference: Reference, f: Florence2, index: int) -> Iterator[list[int]]:
    sample = _exam()[index]
    pixel_values = reference.pixels(_exam().scene(index).image)
    for prefix, _ in sample.pairs:
        sequences, _, _ = reference.generate(pixel_values, f.processor.prompt(prefix), f.options())
        yield _without_padding(sequences[0], f.model.config.text.pad_token_id)


def _without_padding(ids: list[int], pad: int) -> list[int]:
    while ids and ids[-1] == pad:
        ids = ids[:-1]
    return ids


def _samples(count: int) -> Iterator[Sample]:
    return (_exam()[index] for index in range(count))


@cache
def _exam() -> Exam:
    return Exam(SCENES_SEED, SCENES)


def _row(
    f: Florence2, group: str, other: str, stage: str, ours: Iterable[list[int]], theirs: Iterable[list[int]]
) -> Comparison:
    """Compare the answers on the first scenes, in the order of `answer_one_by_one`."""
    count, scenes = TokenCount(), ((prefix, sample) for sample in _samples(SCENES) for prefix, _ in sample.pairs)
    for mine, their in zip(ours, theirs, strict=True):
        prefix, sample = next(scenes)
        count.add(f.model, partial(_encode, f, prefix, sample), [mine], [their])
    return Comparison(group, f"nano, shipped / {other}", stage, count.equal, count.total, ties=count.ties)


def _encode(f: Florence2, prefix: str, sample: Sample) -> Tensor:
    return f.model.encode(f.encode_image(sample.image).features, torch.tensor([f.processor.prompt(prefix)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m parity.specimen", description=__doc__)
    parser.add_argument("--code", type=Path, required=True, metavar="DIR")
    record(parser.parse_args().code)
