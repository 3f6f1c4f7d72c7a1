"""`python -m recipes.nano.calibrate FILE`: fit nano's calibration on scenes that it was not trained or measured on.

Half of the scenes are spoilt. What `florence2 calibrate` does with a data file is done with scenes that are drawn.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import florence2
from florence2.checkpoints.checks.calibration import write_calibration
from florence2.checkpoints.checks.weights import of_weights
from florence2.cli.progress import Progress
from florence2.inputs.tasks import TASKS
from florence2.pipeline import Florence2
from florence2.train.calibrate import Rated, fit, rate, without_calibration
from florence2.train.evaluate import answer_samples
from florence2.train.metrics import Pair
from recipes.nano.exam import Exam

SEED, SPOILT = 101, 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the scenes, fit the tables and write them."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.calibrate", description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE", help="where to write, such as weights/nano/confidence.json")
    parser.add_argument("--model", default="nano", help="the checkpoint (nano)")
    parser.add_argument("--scenes", type=int, default=2000, help="how many scenes (2000)")
    options = parser.parse_args(arguments)
    f = without_calibration(florence2.load(options.model, device="cpu"))
    exam = Exam(SEED, options.scenes, SPOILT)
    pairs: dict[bool, list[Pair]] = {False: [], True: []}
    for index, pair in answer(f, exam):
        pairs[exam.is_spoilt(index)].append(pair)
    calibration = of_weights(fit(join(rate(pairs[False]), rate(pairs[True]))), f.model)
    write_calibration(options.file, calibration, model=options.model, images=options.scenes)
    return 0


def join(clean: Mapping[str, list[Rated]], spoilt: Mapping[str, list[Rated]]) -> dict[str, list[Rated]]:
    """Join the rated answers by kind and task, with at most as many boxes and quads of spoilt scenes as of clean ones.

    Every scene has one text or outline for a question, but on a spoilt one the model may find dozens of boxes where
    nothing is. Those would count for more than the clean scenes, on which all confidences would then be too low.
    """
    joined = {}
    for key in {**clean, **spoilt}:
        rows, others = clean.get(key, []), spoilt.get(key, [])
        kind = TASKS[key].answer if key in TASKS else key
        joined[key] = rows + (others if kind in ("text", "polygons") else others[: len(rows)])
    return joined


def answer(f: Florence2, exam: Exam) -> Iterator[tuple[int, Pair]]:
    """Yield the wanted and the given answer of every question, with the index of its scene."""
    with Progress(len(exam), things="scenes") as progress:
        for index, outcomes in enumerate(answer_samples(f, exam, batch_size=16)):
            for outcome in outcomes:
                assert outcome.pair is not None, outcome.error  # every question of the exam is valid
                yield index, outcome.pair
            progress.show(index + 1)


if __name__ == "__main__":
    sys.exit(main())
