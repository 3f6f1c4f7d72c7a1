"""`florence2 calibrate DATA`: let a model's confidences be frequencies, by questions whose answers are known."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from florence2.answers.confidence import NO_CALIBRATION, Calibration
from florence2.checkpoints.checks.calibration import (
    CALIBRATION_FILE,
    keeps_calibration,
    read_calibration,
    write_calibration,
)
from florence2.checkpoints.files import COMPANIONS, MAX_NAME_BYTES, checkpoint_folder
from florence2.cli.options.arguments import (
    check_at_least,
    check_model,
    generation_changes,
    generation_options,
    load_model,
    say,
)
from florence2.cli.options.tasks import stored_tasks
from florence2.cli.options.values import path_argument
from florence2.errors import ConfigError, OptionError
from florence2.train.command import check_data, check_store
from florence2.train.evaluate_command import add_questions, collect, open_store

if TYPE_CHECKING:
    from florence2.train.calibrate import Rated


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 calibrate",
        description="Answer the questions of a data file, and fit for each kind of answer and each task how often "
        "answers of a raw confidence are right: the confidences are then such frequencies. Use images like those to "
        "come, which the model was not trained on.",
    )
    add_questions(parser)
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
    check_store(options)
    generation_changes(options)
    path = check_model(options)
    target = _target(options, path)
    known = stored_tasks(options, path)
    from florence2.checkpoints.checks.weights import of_weights
    from florence2.train import calibrate
    from florence2.train.evaluate import answer_samples
    from florence2.train.sources import read_samples

    samples = read_samples(options.data, options.images, sys.maxsize, options.task, known)[: options.limit]
    options.calibration = NO_CALIBRATION  # raw values are what a table is fitted to
    model = load_model(options)
    results = answer_samples(
        model, samples, options.batch, generation_options(options, model), open_store(options, model)
    )
    pairs, failed = collect(results, len(samples), as_json=False)
    rated = calibrate.rate(pairs)
    calibration = of_weights(calibrate.fit(rated), model.model)
    write_calibration(target, calibration, model=options.model, images=len(samples))
    _report(calibration, rated)
    print(target)
    return 1 if failed else 0


def _report(calibration: Calibration, rated: "Mapping[str, Sequence[Rated]]") -> None:
    """Print how well each table holds on the answers that it was fitted to; say what it cannot know."""
    from florence2.train.calibrate import LEAST, calibration_error

    for key, rows in rated.items():
        raw, right = [value for value, _ in rows], [correct for _, correct in rows]
        if not calibration.knows(key):
            say(f"florence2: {key} has {len(rows)} rated answers, fewer than {LEAST}: they stay raw.")
            continue
        fitted = [calibration(value, key) for value in raw]
        errors = [calibration_error(values, right) for values in (raw, fitted)]
        print(f"{key:<32}{len(rows):>7}  right {sum(right) / len(rows):.3f}  error {errors[0]:.3f} -> {errors[1]:.3f}")
        if all(right) or not any(right):
            say(
                f"florence2: {'all' if all(right) else 'none'} of the {len(rows)} answers of {key} are right, so its "
                "table cannot tell right answers from wrong ones. Add images that are harder or easier."
            )


def _target(options: argparse.Namespace, path: Path) -> Path:
    """Return where to write. Raises OptionError where that is impossible, so that no answer is computed in vain."""
    own = checkpoint_folder(path) / CALIBRATION_FILE
    other = options.adapter is not None or not keeps_calibration(dict(options.change), options.prepare)
    if other and (options.out is None or _is_same(options.out, own)):
        raise OptionError(
            f"With --adapter, --prepare or --change, {own} would be read for the model without them; say where to "
            "write instead: --out FILE, such as confidence.json in the adapter's folder."
        )
    target: Path = options.out or own
    _check_target(target)
    if target.exists() and not options.overwrite:
        raise OptionError(f"{target} exists; add --overwrite to replace it, or give --out another name.")
    return target


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)


def _check_target(target: Path) -> None:
    """Raise OptionError for a file that cannot be written, or that would replace anything but a calibration."""
    remedy = "Give --out the name of a .json file in an existing folder."
    try:
        exists = os.path.lexists(target) and bool(target.stat())
    except OSError as error:
        raise OptionError(f"{target} cannot be written: {error.strerror}. {remedy}") from None
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise OptionError(f"{target} cannot be written: {target.parent} is not a folder that may be written. {remedy}")
    if len(os.fsencode(target.name)) > MAX_NAME_BYTES or "\0" in str(target):
        raise OptionError(f"{target} cannot be written: the name is too long or holds a null character. {remedy}")
    is_own = target.name == CALIBRATION_FILE  # which may be damaged, and is then replaced
    if exists and not (target.is_file() and (is_own or _is_calibration(target))):
        raise OptionError(f"{target} exists and is not a calibration, so it is not replaced. {remedy}")
    if not exists and (target.suffix != ".json" or target.name in _TAKEN):
        raise OptionError(f"{target} is not a name for a calibration. {remedy}")


_TAKEN = ("config.json", "generation_config.json", "adapter_config.json", "settings.json", *COMPANIONS)
"""Files that have another meaning in a checkpoint's folder."""


def _is_calibration(path: Path) -> bool:
    try:
        read_calibration(path)
    except ConfigError:
        return False
    return True
