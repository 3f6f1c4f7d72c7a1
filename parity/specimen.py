"""The specimen checkpoint, whose answers mean something: its tokens on made-up scenes, all tasks.

`python -m parity.specimen --code DIR` records what Microsoft's code says, from a folder of its .py files.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import torch

from florence2.checkpoint import load_model
from florence2.hub import EMBEDDED_MODEL, resolve
from florence2.pipeline import Florence2, load
from florence2.train.exam import Exam
from parity.compare import MakeReference
from parity.recipe import GOLDEN
from parity.references import Reference, Remote
from parity.report import Row

RECORDS = GOLDEN / "nano.npz"
SCENES_SEED, SCENES, FEW = 4, 200, 8
_SUBJECT = "nano, shipped"


def compare_specimen(group: str, make_reference: MakeReference, count: int) -> Iterator[Row]:
    """A live reference's tokens, with the checkpoint's own settings, on `count` pictures and all tasks."""
    f = load(EMBEDDED_MODEL, device="cpu")
    folder = resolve(EMBEDDED_MODEL)
    reference = make_reference(folder, load_model(folder), torch.float32)
    theirs = [ids for index in range(count) for ids in _reference_answers(reference, f, index)]
    ours = [ids for index in range(count) for ids in our_answers(f, index)]
    yield _row(group, f"{_SUBJECT} / {reference.name}", f"tokens, {count} pictures x all tasks", ours, theirs)


def compare_specimen_records(count: int) -> Iterator[Row]:
    """The recorded tokens of Microsoft's code on the first `count` pictures, and this project against itself."""
    f = load(EMBEDDED_MODEL, device="cpu")
    ours = [ids for index in range(count) for ids in our_answers(f, index)]
    yield _row("records", f"{_SUBJECT} / records", f"tokens, {count} pictures x all tasks", ours, read_records(count))
    singles = [ids for index in range(FEW) for ids in our_answers(f, index, batch_size=1)]
    together = [ids for index in range(FEW) for ids in our_answers(f, index, batch_size=8)]
    yield _row("records", f"{_SUBJECT} / itself", "tokens, batches of 1 and of 8", together, singles)
    threads = torch.get_num_threads()
    by_threads = []
    for number in (1, 2):
        torch.set_num_threads(number)
        by_threads.append([ids for index in range(FEW) for ids in our_answers(f, index)])
    torch.set_num_threads(threads)
    yield _row("records", f"{_SUBJECT} / itself", "tokens, 1 thread and 2", *by_threads)


def our_answers(f: Florence2, index: int, batch_size: int = 8) -> list[list[int]]:
    """The ids of every answer on scene `index`, start id first, nothing behind the end."""
    sample = _exam()[index]
    picture = f.encode_image(sample.image)
    answers = f.run_batch([(prefix, picture) for prefix, _ in sample.pairs], batch_size=batch_size)
    return [list(answer.token_ids) for answer in answers]


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


@cache
def _exam() -> Exam:
    return Exam(SCENES_SEED, SCENES)


def _row(group: str, subject: str, stage: str, ours: Iterable[list[int]], theirs: Iterable[list[int]]) -> Row:
    pairs = list(zip(ours, theirs, strict=True))
    return Row(group, subject, stage, sum(mine == other for mine, other in pairs), len(pairs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m parity.specimen", description=__doc__)
    parser.add_argument("--code", type=Path, required=True, metavar="DIR")
    record(parser.parse_args().code)
