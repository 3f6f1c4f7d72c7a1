"""Texts that are read as answers: no text raises, shapes are finite, and the time is linear in the length."""

import time
from pathlib import Path
from random import Random
from typing import Any, get_args

from florence2.answers.answer import parse_answer
from florence2.answers.parsing import clean_label, find_regions, remove_markers
from florence2.errors import Florence2Error
from florence2.inputs.tasks import TASKS, AnswerKind
from tests.fuzz import material, values
from tests.fuzz.answers import check_shapes
from tests.fuzz.worker import Wrong, expect

KINDS = get_args(AnswerKind)
_PIECES = (
    *("<loc_0>", "<loc_999>", "<loc_52>", "<loc_5>" * 4, "<loc_7>" * 8, "<poly>", "</poly>", "<sep>", "<and>", "<od>"),
    *("cat", "a red car", "it", "the image", "\n", " ", "<s>", "</s>", "<pad>", "<", ">", "<<", ">>", "loc_5>"),
    *("<loc_>", "<loc_-1>", "<loc_1000>", "<loc_05>", "<loc_٣>", "<loc_5", "<LOC_5>", "é", "日本", "\ufffd", "\x00"),
)
_TASKS = {kind: next(task.token for task in TASKS.values() if task.answer == kind) for kind in KINDS}


def draw(random: Random) -> tuple[str, Any]:
    """(form, value): a text of pieces, one long repetition, a well-formed answer, or ids."""
    form = random.choice(("pieces", "pieces", "pieces", "long", "regions", "ids"))
    kind, size = random.choice(KINDS), (random.randint(1, 5000), random.choice((1, 480, 65535)))
    if form == "pieces":
        pieces = [_piece(random) for _ in range(random.choice((1, 3, 8, 30)))]
        return form, (kind, size, "".join(pieces))
    if form == "long":
        return form, (kind, size, "".join(_piece(random) for _ in range(random.randint(1, 3))))
    if form == "regions":
        labels = ["".join(random.choice("abc é") for _ in range(5)).strip() or "x" for _ in range(random.randint(0, 5))]
        return form, (size, [(label, [random.randrange(1000) for _ in range(4)]) for label in labels])
    count = random.randint(0, 40)
    return form, (
        kind,
        size,
        [random.choice((random.randrange(1631), random.randint(600, 1631))) for _ in range(count)],
    )


def _piece(random: Random) -> str:
    if random.random() < 0.05:
        return f"<loc_{'9' * random.choice((3, 4, 5, 39, 400, 5000))}>" * random.choice((1, 4))
    return random.choice(_PIECES) if random.random() < 0.85 else values.text(random)


def check(case: tuple[str, Any], place: Path) -> None:
    form, value = case
    try:
        {"pieces": _read, "long": _read_long, "regions": _read_regions, "ids": _read_ids}[form](*value)
    except Florence2Error as error:
        if form != "ids":
            raise Wrong(f"a text was refused: {error}") from None
        raise


def _read(kind: AnswerKind, size: tuple[int, int], text: str) -> None:
    check_shapes(parse_answer(_TASKS[kind], kind, text, size))
    clean_label(text)
    expect(list(remove_markers(text).positions) == sorted(remove_markers(text).positions), "positions are in order")
    for region in find_regions(kind, text):
        read = "".join(text[i] for row in region.positions for i in row)
        numbers = [int(part.rstrip(">")) for part in read.split("<loc_")[1:]]
        written = [bin for row in region.bins for bin in row]
        expect(set(written) <= set(numbers) and len(numbers) - len(written) <= len(region.bins), f"{read} is {written}")


def _read_long(kind: AnswerKind, size: tuple[int, int], piece: str) -> None:
    """Four times the length may take four times the time, not sixteen."""
    short, long = (_seconds(kind, size, piece * (length // max(1, len(piece)))) for length in (25_000, 100_000))
    if long > 0.5 and long > 10 * short:  # a second look, because the machine may be busy
        short, long = (_seconds(kind, size, piece * (length // len(piece))) for length in (25_000, 100_000))
        expect(long <= 10 * short, f"25,000 characters take {short:.2f} s, 100,000 take {long:.2f} s")


def _seconds(kind: AnswerKind, size: tuple[int, int], text: str) -> float:
    started = time.process_time()
    parse_answer(_TASKS[kind], kind, text, size).to_florence()
    return time.process_time() - started


def _read_regions(size: tuple[int, int], regions: list[tuple[str, list[int]]]) -> None:
    """What is written well is read whole."""
    text = "".join(label + "".join(f"<loc_{bin}>" for bin in bins) for label, bins in regions)
    answer = parse_answer("<OD>", "boxes", f"</s><s>{text}</s>", size)
    expect([box.label for box in answer.boxes] == [label.strip() for label, _ in regions], "labels are kept")
    for box, (_, bins) in zip(answer.boxes, regions, strict=True):
        wanted = [(bin + 0.5) * size[i % 2] / 1000 for i, bin in enumerate(bins)]
        expect(
            all(abs(a - b) < 0.01 * max(size) / 1000 + 1e-3 for a, b in zip(box.xyxy, wanted, strict=True)),
            f"{box} is {bins}",
        )


def _read_ids(kind: AnswerKind, size: tuple[int, int], ids: list[int]) -> None:
    f = material.model()
    logprobs = [-0.1 * (i % 7) for i in range(len(ids) - 1)]
    answer = f.processor.answer(_TASKS[kind], token_ids=ids, image_size=size, token_logprobs=logprobs)
    check_shapes(answer)
    plain = f.processor.answer(_TASKS[kind], f.processor.decode(ids), image_size=size)
    expect([b.xyxy for b in plain.boxes] == [b.xyxy for b in answer.boxes], "ids and their text give the same boxes")
    expect([q.xyxyxyxy for q in plain.quads] == [q.xyxyxyxy for q in answer.quads], "the same quads")
    expect([p.rings for p in plain.polygons] == [p.rings for p in answer.polygons], "the same outlines")
