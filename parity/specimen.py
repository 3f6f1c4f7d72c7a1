"""The specimen checkpoint, whose answers mean something: its tokens on made-up scenes, all tasks.

`python -m parity.specimen --code DIR` records what Microsoft's code says, from a folder of its .py files.
"""

import argparse
import random
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.hub import EMBEDDED_MODEL, resolve
from florence2.pipeline import Florence2, load
from florence2.train.data import Sample
from parity.compare import MakeReference
from parity.recipe import GOLDEN
from parity.references import Reference, Remote
from parity.report import Row
from recipes.nano.exam import Exam

RECORDS = GOLDEN / "nano.npz"
SCENES_SEED, SCENES = 4, 200


def compare_specimen(group: str, make_reference: MakeReference, count: int = SCENES) -> Iterator[Row]:
    """A live reference's tokens, with the checkpoint's own settings, on `count` pictures and all tasks."""
    f = load(EMBEDDED_MODEL, device="cpu")
    folder = resolve(EMBEDDED_MODEL)
    reference = make_reference(folder, load_model(folder), torch.float32)
    theirs = [ids for index in range(count) for ids in _reference_answers(reference, f, index)]
    yield _row(group, reference.name, f"tokens, {count} pictures x all tasks", answer_one_by_one(f, count), theirs)


def compare_specimen_records(count: int = SCENES) -> Iterator[Row]:
    """The recorded tokens of Microsoft's code on the first `count` pictures, and this project against itself."""
    f = load(EMBEDDED_MODEL, device="cpu")
    threads = torch.get_num_threads()
    by_threads = []
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            by_threads.append(answer_one_by_one(f, count))
    finally:
        torch.set_num_threads(threads)
    alone, pictures = by_threads[1], f"{count} pictures x all tasks"
    yield _row("records", "records", f"tokens, {pictures}", alone, read_records(count))
    yield _row("records", "itself", f"1 thread and 2, {pictures}", *by_threads)
    yield _row("records", "itself", f"batches of 1 and of 8, {pictures}", alone, answer_in_batches(f, count))


def answer_one_by_one(f: Florence2, count: int) -> list[list[int]]:
    """The ids of every answer on the first `count` scenes, start id first, nothing behind the end."""
    rows = []
    for sample in _samples(count):
        picture = f.encode_image(sample.image)
        rows += [list(f.run(prefix, picture).token_ids) for prefix, _ in sample.pairs]
    return rows


def answer_in_batches(f: Florence2, count: int, size: int = 8) -> list[list[int]]:
    """The same in batches of whatever pictures and tasks come together."""
    asked = [(prefix, sample.image) for sample in _samples(count) for prefix, _ in sample.pairs]
    order = random.Random(0).sample(range(len(asked)), len(asked))
    answers = f.run_batch([asked[number] for number in order], batch_size=size)
    found = dict(zip(order, answers, strict=True))
    return [list(found[number].token_ids) for number in range(len(asked))]


def read_records(count: int) -> list[list[int]]:
    """What Microsoft's code said on the first `count` pictures."""
    stored = np.load(RECORDS)
    ends = np.cumsum(stored["lengths"])
    rows = np.split(stored["ids"].astype(int), ends[:-1])
    answers = int(stored["answers"][:count].sum())
    return [row.tolist() for row in rows[:answers]]


def record(code: Path, count: int = SCENES) -> None:
    """Ask Microsoft's code, and write `RECORDS`."""
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


def _row(group: str, other: str, stage: str, ours: Iterable[list[int]], theirs: Iterable[list[int]]) -> Row:
    pairs = list(zip(ours, theirs, strict=True))
    return Row(group, f"nano, shipped / {other}", stage, sum(mine == other for mine, other in pairs), len(pairs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m parity.specimen", description=__doc__)
    parser.add_argument("--code", type=Path, required=True, metavar="DIR")
    record(parser.parse_args().code)
