"""`python -m recipes.nano.confidence`: how well several formulas tell right answers from wrong ones, on fresh scenes.

Prints the tables of docs/confidence.md. Nothing was trained, calibrated or chosen on the seeds of these scenes.
"""

import argparse
import json
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch

import florence2
from florence2.answers.answer import Answer, Box
from florence2.answers.confidence import Likelihoods
from florence2.answers.parsing import WrittenRegion, find_written
from florence2.cli.progress import Progress
from florence2.inputs.coordinates import NUM_BINS
from florence2.pipeline import EncodedImage, Florence2
from florence2.train.average_precision import Detection, average_precision
from florence2.train.calibrate import calibration_error, separation, without_calibration
from florence2.train.metrics import right_regions
from florence2.train.overlap import box_area, overlaps
from recipes.nano.scene_tasks import SceneQuestion, ask
from recipes.nano.scenes import make_scene
from recipes.nano.spoiling import spoil

CLEAN_SEED, SPOILT_SEED = 41, 42
TASKS = ("<OD>", "<OCR_WITH_REGION>")
CHOSEN = "label x least near 4 bins + 4 %"
EARLY = 200
"""Regions up to this token are also compared alone: beyond it are only answers that find one thing over and over."""
DRAWS = 500
"""How often the scenes are drawn again for the intervals of differences."""
Values: TypeAlias = dict[str, float]
Found: TypeAlias = dict[str, Any]
"""The task, the scene's number, the label, area and last token of a region, whether it is right, and its value by each
formula."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the scenes, or read earlier values from `--keep`, and print the tables."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.confidence", description=__doc__)
    parser.add_argument("--model", default="nano", help="the checkpoint (nano)")
    parser.add_argument("--scenes", type=int, default=500, help="how many clean, and how many spoilt ones (500)")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="keep the values there, or read them from it")
    options = parser.parse_args(arguments)
    f = florence2.load(options.model, device="cpu")
    if options.keep is not None and options.keep.exists():
        measured = json.loads(options.keep.read_text(encoding="utf-8"))
    else:
        measured = {name: measure(f, seed, options.scenes) for name, seed in _SERIES.items()}
        if options.keep is not None:
            options.keep.write_text(json.dumps(measured), encoding="utf-8")
    print(format_tables(f, measured))
    return 0


_SERIES = {"clean": CLEAN_SEED, "spoilt": SPOILT_SEED}


def measure(f: Florence2, seed: int, scenes: int) -> dict[str, list[Any]]:
    """Return "found", what the model found on the scenes of a seed, and "truths", the boxes of `<OD>` by scene."""
    found: list[Found] = []
    truths: list[list[Any]] = []
    raw = without_calibration(f)
    with Progress(scenes, things="scenes") as progress:
        for index in range(scenes):
            scene, rng = make_scene(seed, index), random.Random(f"exam {seed}/{index}")
            image = scene.image
            if seed == SPOILT_SEED:
                image = spoil(image, random.Random(f"spoil {seed}/{index}"))
            encoded = raw.encode_image(image)
            for question in [question for task in TASKS if (question := ask(task, scene, rng)) is not None]:
                truth = raw.processor.answer(question.prefix, f"</s><s>{question.suffix}</s>", image_size=encoded.size)
                found += [{"scene": index, **each} for each in _measure(raw, encoded, question, truth)]
                if question.prefix == "<OD>":
                    truths.append([(box.label, box_area(box, truth.image_size)) for box in truth.boxes])
            progress.show(index + 1)
    return {"found": found, "truths": truths}


def _measure(f: Florence2, image: EncodedImage, question: SceneQuestion, truth: Answer) -> Iterator[Found]:
    answer = f.run(question.prefix, image, num_return_sequences=3)
    likelihoods = read_likelihoods(f, image, question.prefix, answer)
    shapes: list[Any] = [*answer.boxes, *answer.quads]
    written = find_written(answer.kind, answer.token_texts)
    for shape, region, right in zip(shapes, written, right_regions(truth, answer), strict=True):
        yield {
            "task": answer.task,
            "label": shape.label,
            "area": box_area(shape, answer.image_size) if isinstance(shape, Box) else None,
            "last": max(token for row in region.rows for token in row),
            "right": bool(right),
            "values": values_of(shape, region, likelihoods) | _with_alternatives(answer, shape),
        }


def read_likelihoods(f: Florence2, image: EncodedImage, task: str, answer: Answer) -> Likelihoods:
    """Compute the likelihoods of an answer by the specification, `decode`, to check the faster way along with it."""
    with torch.no_grad():
        memory = f.model.encode(image.features, torch.tensor([f.processor.prompt(task)]))
        scores = f.model.decode(torch.tensor([answer.token_ids[:-1]]), memory)[0].log_softmax(dim=-1)
    own = scores.gather(1, torch.tensor(answer.token_ids[1:])[:, None])[:, 0]
    return Likelihoods(own.numpy(), scores[:, list(f.processor.location_ids)].exp().numpy())


def values_of(shape: Any, written: WrittenRegion, likelihoods: Likelihoods) -> Values:
    """Return the value of a region by each formula that needs one answer alone."""
    label = math.exp(likelihoods.logprobs[list(written.label)].sum())
    rows = written.region.bins
    extents = [max(1, max(axis) - min(axis)) for axis in ([b for row in rows for b in row[i::2]] for i in (0, 1))]

    def near(share: float, fixed: float = 0.0) -> list[float]:
        masses = []
        for row, tokens in zip(rows, written.rows, strict=True):
            for i, (bin, token) in enumerate(zip(row, tokens, strict=False)):
                reach = fixed + share * extents[i % 2]
                first, last = max(0, math.ceil(bin - reach)), min(NUM_BINS - 1, math.floor(bin + reach))
                masses.append(min(1.0, float(likelihoods.locations[token, first : last + 1].sum())))
        return masses

    return {
        CHOSEN: float(shape.confidence),
        "score": float(shape.score),
        "label": label,
        "label x score": label * shape.score,
        **{f"label x all near {name}": label * math.prod(near(*reach)) for name, reach in _REACHES.items()},
        **{f"label x least near {name}": label * min(near(*reach)) for name, reach in _REACHES.items()},
        "label x all near 4 bins + 4 %": label * math.prod(near(0.04, 4.0)),
        "least near 4 bins + 4 %": min(near(0.04, 4.0)),
    }


_REACHES = {"5 bins": (0.0, 5.0), "20 bins": (0.0, 20.0), "8 %": (0.08,), "30 %": (0.3,), "50 %": (0.5,)}


def _with_alternatives(answer: Answer, shape: Any) -> Values:
    """Return the chosen formula times the share of the beams' probability that has the same region."""
    totals = np.array([sum(each.token_logprobs) for each in (answer, *answer.alternatives)])
    weights = np.exp(totals - totals.max())  # of a long answer exp(total) alone would be 0
    agreeing = [_has(each, shape) for each in (answer, *answer.alternatives)]
    return {f"{CHOSEN} x beams": float(shape.confidence * weights[agreeing].sum() / weights.sum())}


def _has(answer: Answer, shape: Any) -> bool:
    found: list[Any] = [*answer.boxes, *answer.quads]
    own = [each for each in found if each.label == shape.label]
    return bool((overlaps([_around(shape)], [_around(each) for each in own]) >= 0.5).any())


def _around(shape: Any) -> list[float]:
    row = shape.xyxy if isinstance(shape, Box) else shape.xyxyxyxy
    left, top = min(row[0::2]), min(row[1::2])
    return [left, top, max(row[0::2]) - left, max(row[1::2]) - top]


def format_tables(f: Florence2, measured: Mapping[str, Any]) -> str:
    """Return a table of each task, and one of the average precision of `<OD>`, in Markdown."""
    parts = [_format_task(f, task, measured) for task in TASKS]
    return "\n\n".join([*parts, _format_precision(measured)])


def _format_task(f: Florence2, task: str, measured: Mapping[str, Any]) -> str:
    scenes = {name: len(values["truths"]) for name, values in measured.items()}
    series = {name: [each for each in values["found"] if each["task"] == task] for name, values in measured.items()}
    early = [each for each in series["spoilt"] if each["last"] < EARLY]
    parts = [*series.items(), (f"spoilt up to token {EARLY}", early)]
    counts = ", ".join(
        f"{name} {sum(each['right'] for each in rows)} right and {sum(not each['right'] for each in rows)} wrong"
        for name, rows in parts
    )
    head = [*(f"AUC {name}" for name, _ in parts), *(f"ECE {name}" for name in series)]
    lines = [f"`{task}`: {counts}.", "", f"| formula | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
    drawn = [_draw(rows, scenes[name.split()[0]]) for name, rows in parts]
    for formula in next(iter(series.values()))[0]["values"]:
        areas = [_format_area(rows, formula, own) for (_, rows), own in zip(parts, drawn, strict=True)]
        errors = [f"{calibration_error(*_numbers(rows, formula)):.3f}" for rows in series.values()]
        lines.append(f"| {formula} | {' | '.join([*areas, *errors])} |")
    kind = f.processor.tasks[task].answer
    if f.processor.calibration.knows(task, kind):
        fitted = [
            ([f.processor.calibration(value, task, kind) for value in values], right)
            for values, right in (_numbers(rows, CHOSEN) for rows in series.values())
        ]
        errors = [f"{calibration_error(*each):.3f}" for each in fitted]
        lines.append(f"| **{CHOSEN}, calibrated** |{' |' * len(parts)} {' | '.join(errors)} |")
        even = ", ".join(f"{name} {_even_error(*each):.3f}" for name, each in zip(series, fitted, strict=True))
        lines += ["", f"Calibrated, over ten parts of equally many answers: {even}."]
    return "\n".join(lines)


def _numbers(rows: Sequence[Found], formula: str) -> tuple[list[float], list[bool]]:
    return [each["values"][formula] for each in rows], [each["right"] for each in rows]


def _even_error(confidences: Sequence[float], right: Sequence[bool]) -> float:
    """Return the calibration error over ten parts of equally many answers."""
    values, truths = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
    parts = np.array_split(np.argsort(values, kind="stable"), 10)
    return float(sum(abs((values[part] - truths[part]).sum()) for part in parts) / len(values))


def _draw(rows: Sequence[Found], scenes: int) -> np.ndarray:
    """Draw as many scenes as there are, with repetition, DRAWS times: how often each region then counts, (D, N)."""
    drawn = np.random.default_rng(0).multinomial(scenes, [1 / scenes] * scenes, DRAWS)
    return drawn[:, [each["scene"] for each in rows]]


def _format_area(rows: Sequence[Found], formula: str, drawn: np.ndarray) -> str:
    """Format the AUC, and where 95 % of its differences from the chosen formula's lie when scenes are drawn again."""
    values, right = _numbers(rows, formula)
    area = separation(values, right)
    if area is None or formula == CHOSEN:
        return "–" if area is None else f"{area:.3f}"
    chosen, _ = _numbers(rows, CHOSEN)
    low, high = np.nanpercentile(_areas(values, right, drawn) - _areas(chosen, right, drawn), [2.5, 97.5])
    return f"{area:.3f} ({low:+.3f} to {high:+.3f})"


def _areas(values: Sequence[float], right: Sequence[bool], counts: np.ndarray) -> np.ndarray:
    """Return the AUC for each row of `counts` (D, N), how often each region counts: NaN where only one sort does."""
    value, is_right = np.asarray(values), np.asarray(right)
    high, low = value[is_right][:, None], value[~is_right]
    wins = (high > low) + 0.5 * (high == low)
    weights = counts[:, is_right].astype(np.float64), counts[:, ~is_right].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(((weights[0] @ wins) * weights[1]).sum(axis=1) / np.prod([w.sum(axis=1) for w in weights], 0))


def _format_precision(measured: Mapping[str, Any]) -> str:
    """Format the mAP of `<OD>` with its boxes ranked by each formula."""
    lines = ["| `<OD>` ranked by | mAP 0.5 clean | 0.5:0.95 | mAP 0.5 spoilt | 0.5:0.95 |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for formula in next(iter(measured.values()))["found"][0]["values"]:
        cells = []
        for values in measured.values():
            truths = [[Detection(label, area) for label, area in row] for row in values["truths"]]
            rows: list[list[Detection]] = [[] for _ in truths]
            for each in values["found"]:
                if each["task"] == "<OD>":
                    rows[each["scene"]].append(Detection(each["label"], each["area"], each["values"][formula]))
            cells += [f"{100 * value:.2f}" for value in average_precision(truths, rows) or ()]
        lines.append(f"| {formula} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
