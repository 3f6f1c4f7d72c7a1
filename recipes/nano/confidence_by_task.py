"""`python -m recipes.nano.confidence_by_task`: how far the confidences of every task are from frequencies.

Prints the last table of docs/confidence.md, on the scenes of `recipes.nano.confidence` and all tasks.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence

import florence2
from florence2.pipeline import Florence2
from florence2.train.calibrate import Rated, calibration_error, rate, separation, without_calibration
from recipes.nano.calibrate import answer
from recipes.nano.confidence import CLEAN_SEED, SPOILT_SEED
from recipes.nano.exam import Exam
from recipes.nano.scene_tasks import SCENE_TASKS


def main(arguments: Sequence[str] | None = None) -> int:
    """Answer the scenes and print the table."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.confidence_by_task", description=__doc__)
    parser.add_argument("--model", default="nano", help="the checkpoint (nano)")
    parser.add_argument("--scenes", type=int, default=500, help="how many clean, and how many spoilt ones (500)")
    options = parser.parse_args(arguments)
    f = florence2.load(options.model, device="cpu")
    raw = without_calibration(f)
    exams = Exam(CLEAN_SEED, options.scenes), Exam(SPOILT_SEED, options.scenes, spoilt=1.0)
    print(format_table(f, [rate(pair for _, pair in answer(raw, exam)) for exam in exams]))
    return 0


def format_table(f: Florence2, series: Sequence[Mapping[str, Sequence[Rated]]]) -> str:
    """Return a row for each task, in Markdown: how many are right, AUC, and the error before and after calibration."""
    head = [f"{column} {name}" for name in ("clean", "spoilt") for column in ("right", "AUC", "raw ECE", "ECE")]
    lines = [f"| task | {' | '.join(head)} |", "| --- |" + " --- |" * len(head)]
    for task in SCENE_TASKS:
        cells = [cell for rated in series for cell in _cells(f, task, rated.get(task, ()))]
        lines.append(f"| `{task}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(f: Florence2, task: str, rated: Sequence[Rated]) -> list[str]:
    values, right = [value for value, _ in rated], [correct for _, correct in rated]
    area = separation(values, right)
    fitted = [f.processor.calibration(value, task, f.processor.tasks[task].answer) for value in values]
    errors = [f"{calibration_error(each, right):.3f}" for each in (values, fitted)]
    return [f"{sum(right)} of {len(right)}", "–" if area is None else f"{area:.3f}", *errors]


if __name__ == "__main__":
    sys.exit(main())
