"""`florence2 calibrate DATA`: let a model's confidences be frequencies, by questions whose answers are known."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from florence2.checkpoints.files import checkpoint_folder
from florence2.cli.options import (
    add_generation,
    add_model,
    add_weights,
    check_at_least,
    check_model,
    generation_changes,
    generation_options,
    load_model,
    path_argument,
    say,
    stored_tasks,
)
from florence2.errors import OptionError
from florence2.train.command import add_data, check_data
from florence2.train.evaluate_command import collect


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 calibrate",
        description="Answer the questions of a data file, and fit for each kind of answer and each task how often "
        "answers of a raw confidence are right: the confidences are then such frequencies. Use images like those to "
        "come, which the model was not trained on.",
    )
    add_data(parser)
    add_model(parser)
    add_weights(parser)
    add_generation(parser)
    parser.add_argument("--batch", type=int, metavar="N", help="questions answered at once (default: as memory allows)")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images of DATA (default: all)")
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="where to write (default: confidence.json next to the model's weights, where it is found again)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Answer the questions, fit the tables, write the file, and print how well they hold on the same answers.

    Returns:
        1 if a question could not be answered, otherwise 0.

    Raises:
        Florence2Error: The data, the model or an option cannot be used, or too few answers could be rated.
    """
    options = build_parser().parse_args(arguments)
    check_at_least(options, 1, "batch", "limit")
    check_data(options, "data", "images")
    generation_changes(options)
    path = check_model(options)
    target = _target(options, path)
    known = stored_tasks(options, path)
    from florence2.checkpoints.checks.calibration import write_calibration
    from florence2.train import calibrate
    from florence2.train.evaluate import answer_samples
    from florence2.train.sources import read_samples

    samples = read_samples(options.data, options.images, sys.maxsize, options.task, known)[: options.limit]
    model = calibrate.without_calibration(load_model(options))
    results = answer_samples(model, samples, options.batch, generation_options(options, model))
    pairs, failed = collect(results, len(samples), as_json=False)
    rated = calibrate.rate(pairs)
    calibration = calibrate.fit(rated)
    write_calibration(target, calibration, model=options.model, images=len(samples))
    for key, rows in rated.items():
        raw, right = [value for value, _ in rows], [correct for _, correct in rows]
        if not calibration.knows(key):
            say(f"florence2: {key} has {len(rows)} rated answers, fewer than {calibrate.LEAST}: they stay raw.")
            continue
        fitted = [calibration(value, key) for value in raw]
        errors = [calibrate.calibration_error(values, right) for values in (raw, fitted)]
        print(f"{key:<32}{len(rows):>7}  right {sum(right) / len(rows):.3f}  error {errors[0]:.3f} -> {errors[1]:.3f}")
    print(target)
    return 1 if failed else 0


def _target(options: argparse.Namespace, path: Path) -> Path:
    """Return where to write. Raises OptionError for a file that exists, unless it may be replaced."""
    if options.out is None and options.adapter is not None:
        raise OptionError("With --adapter, say where to write: --out FILE, such as confidence.json in its folder.")
    target: Path = options.out or checkpoint_folder(path) / "confidence.json"
    if target.exists() and not options.overwrite:
        raise OptionError(f"{target} exists; add --overwrite to replace it, or give --out another name.")
    return target
