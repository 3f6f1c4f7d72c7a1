"""Compare nano's answers without torch, from exported graphs, with those in torch: exact parts and rounding."""

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from florence2.answers.answer import Answer
from florence2.checkpoints.hub import EMBEDDED_MODEL
from florence2.export.exporting import export_onnx
from florence2.lite import load as load_lite
from florence2.loading import load
from parity.report import Comparison, largest_difference
from parity.specimen import SCENES_SEED
from recipes.nano.exam import Exam

SCENES = 16


def compare_lite(count: int = SCENES) -> Iterator[Comparison]:
    """Compare all tasks on `count` scenes, greedy and with three beams."""
    torch_model = load(EMBEDDED_MODEL, device="cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "graphs"
        export_onnx(load(EMBEDDED_MODEL, device="cpu", attention="eager"), folder)
        lite = load_lite(folder)
        for beams in (1, 3):
            equal, differences = [], []
            for sample in (Exam(SCENES_SEED, count)[index] for index in range(count)):
                mine, other = lite.encode_image(sample.image), torch_model.encode_image(sample.image)
                for prefix, _ in sample.pairs:
                    ours = lite.run(prefix, mine, num_beams=beams)
                    theirs = torch_model.run(prefix, other, num_beams=beams)
                    equal.append(parts(ours) == parts(theirs))
                    if equal[-1]:
                        differences.append(largest_difference(numbers(ours), numbers(theirs)))
            stage = f"ids, places, finish reasons, {'greedy' if beams == 1 else f'{beams} beams'}"
            yield Comparison(
                "lite", "nano, shipped / lite", stage, sum(equal), len(equal), max(differences), "log-probabilities"
            )


def parts(answer: Answer) -> list[Any]:
    """Return what must be exactly equal: ids, text, places with their labels, and finish reasons."""
    rows: list[Any] = []
    for each in (answer, *answer.alternatives):
        places = [
            *((box.xyxy, box.label) for box in each.boxes),
            *((quad.xyxyxyxy, quad.label) for quad in each.quads),
            *((polygon.rings, polygon.label) for polygon in each.polygons),
        ]
        rows.append((each.token_ids, each.text, places, each.finish_reason))
    return rows


def numbers(answer: Answer) -> list[float]:
    """Return what may differ by rounding: log-probabilities, score and confidences."""
    regions: list[Any] = [answer, *answer.boxes, *answer.quads, *answer.polygons]
    confidences = [0.0 if region.confidence is None else region.confidence for region in regions]
    return [*answer.token_logprobs, answer.sequence_score or 0.0, *confidences]
