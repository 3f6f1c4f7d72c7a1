"""Read and write `confidence.json`, the calibration of a checkpoint's confidences, strictly; choose a model's own."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from florence2.answers.confidence import NO_CALIBRATION, Calibration, Table
from florence2.checkpoints.files import Fields, read_json, write_json
from florence2.errors import ConfigError, listing, shown
from florence2.inputs.tasks import AnswerKind

CALIBRATION_FILE = "confidence.json"
MAX_BYTES, MAX_TABLES, MAX_POINTS = 1 << 20, 1000, 1000


def read_calibration(path: Path) -> Calibration:
    """Read a calibration.

        {"tables": {"boxes": {"raw": [0, 0.4, 1], "frequency": [0.1, 0.5, 0.98]}, "<OD>": ...}, "weights": [7.1, 80.2]}

    The keys are kinds of answers, and tokens of tasks; `raw` rises strictly from 0 to 1, `frequency` strictly within 0
    to 1. `weights`, which may be missing, are those of `Calibration`. Raises ConfigError listing every problem.
    """
    if not os.path.lexists(path):
        raise ConfigError(f"The calibration {path} does not exist; give a file that `florence2 calibrate` has written.")
    problems: list[str] = []
    top = Fields("the file", read_json(path, MAX_BYTES, unique=True), problems)
    items, weights = top.take("tables", dict), top.take_tuple("weights", float, [])
    top.finish(inert=("images", "model"))
    if len(items) > MAX_TABLES:
        problems.append(f"it has {len(items):,} tables; at most {MAX_TABLES:,} are read")
        items = {}
    tables = {str(key): _read_table(str(key), value, problems) for key, value in items.items()}
    if len(weights) not in (0, 2):
        problems.append(f"weights has {len(weights)} numbers; it must have 2, the sum and the norm")
    if problems:
        raise ConfigError(f"{path}: {listing(problems, '; ')}.")
    return Calibration(tables, (weights[0], weights[1]) if weights else None)


def write_calibration(path: Path, calibration: Calibration, **facts: Any) -> None:
    """Write a calibration, whole or not at all, with `facts` for people: `images` and `model`."""
    tables = {
        key: {"raw": list(raw), "frequency": list(frequency)} for key, (raw, frequency) in calibration.tables.items()
    }
    weights = {} if calibration.weights is None else {"weights": list(calibration.weights)}
    write_json(path, {**facts, **weights, "tables": tables})


def keeps_calibration(changes: Iterable[str] | None, prepare: object | None) -> bool:
    """Return whether a model that is loaded with `changes` and `prepare` is still the one that was calibrated.

    Settings of generation leave it the same; any other change, and any `prepare`, makes another model.
    """
    return prepare is None and all(name.startswith("generation.") for name in changes or ())


def choose_calibration(
    folder: Path,
    adapter: Path | None = None,
    file: Path | None = None,
    changes: Iterable[str] | None = None,
    prepare: object | None = None,
) -> Calibration:
    """Return the calibration of a model: of `file`, else of its folder or adapter where it still belongs to it.

    No file but the chosen one is read. Raises ConfigError with the remedy where that one is missing or damaged.
    """
    if file is not None:
        return read_calibration(file)
    own = (adapter or folder) / CALIBRATION_FILE  # an adapter changes what a confidence means
    if not keeps_calibration(changes, prepare) or not os.path.lexists(own):
        return NO_CALIBRATION
    try:
        return read_calibration(own)
    except ConfigError as error:
        raise ConfigError(
            f"{error} Write it again with `florence2 calibrate --overwrite`, delete it (confidences are then raw), or "
            "give another file with --calibration FILE."
        ) from None


def calibration_digest(calibration: Calibration) -> str:
    """Return a short name of a calibration's tables, "raw" for none."""
    if not calibration.tables:
        return "raw"
    tables = json.dumps(dict(calibration.tables), sort_keys=True)
    return hashlib.sha256(tables.encode()).hexdigest()[:16]


def _read_table(key: str, values: Any, problems: list[str]) -> Table:
    name = f"tables[{shown(key)}]"
    if key not in get_args(AnswerKind) and not (key.startswith("<") and key.endswith(">")):
        problems.append(f"{name} is neither a kind of answer ({', '.join(get_args(AnswerKind))}) nor a task's <TOKEN>")
    if isinstance(values, Mapping):  # whole numbers stand for themselves
        values = {each: _as_floats(value) for each, value in values.items()}
    fields = Fields(name, values, problems)
    before = len(problems)
    raw, frequency = fields.take_tuple("raw", float), fields.take_tuple("frequency", float)
    fields.finish()
    if len(problems) > before:
        return raw, frequency
    if not 2 <= len(raw) <= MAX_POINTS or len(raw) != len(frequency):
        problems.append(f"{name} has {len(raw)} and {len(frequency)} numbers; both rows must have 2 to {MAX_POINTS}")
    elif not (_rises(raw) and raw[0] == 0 and raw[-1] == 1):
        problems.append(f"{name}.raw must rise strictly from 0 to 1")
    elif not (_rises(frequency) and frequency[0] >= 0 and frequency[-1] <= 1):
        problems.append(f"{name}.frequency must rise strictly, within 0 to 1")
    return raw, frequency


def _as_floats(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    return [float(number) if type(number) is int and 0 <= number <= 1 else number for number in value]


def _rises(row: tuple[float, ...]) -> bool:
    return all(one < other for one, other in pairwise(row))
