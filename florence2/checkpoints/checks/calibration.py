"""Read and write `confidence.json`, the calibration of a checkpoint's confidences, strictly."""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

from florence2.answers.confidence import Calibration, Table
from florence2.checkpoints.files import Fields, read_json, write_json
from florence2.errors import ConfigError, listing, shown
from florence2.inputs.tasks import AnswerKind

CALIBRATION_FILE = "confidence.json"
MAX_BYTES, MAX_TABLES, MAX_POINTS = 1 << 20, 1000, 1000


def read_calibration(path: Path) -> Calibration:
    """Read a calibration.

        {"tables": {"boxes": {"raw": [0, 0.4, 1], "frequency": [0.1, 0.5, 0.98]}, "<OD>": ...}}

    The keys are kinds of answers, and tokens of tasks; `raw` rises strictly from 0 to 1, `frequency` strictly within 0
    to 1. Raises ConfigError listing every problem.
    """
    problems: list[str] = []
    top = Fields("the file", read_json(path, MAX_BYTES), problems)
    items = top.take("tables", dict)
    top.finish(inert=("images", "model"))
    if len(items) > MAX_TABLES:
        problems.append(f"it has {len(items):,} tables; at most {MAX_TABLES:,} are read")
        items = {}
    tables = {str(key): _read_table(str(key), value, problems) for key, value in items.items()}
    if problems:
        raise ConfigError(f"{path}: {listing(problems, '; ')}.")
    return Calibration(tables)


def write_calibration(path: Path, calibration: Calibration, **facts: Any) -> None:
    """Write a calibration, whole or not at all, with `facts` for people: `images` and `model`."""
    tables = {
        key: {"raw": list(raw), "frequency": list(frequency)} for key, (raw, frequency) in calibration.tables.items()
    }
    write_json(path, {**facts, "tables": tables})


def find_calibration(folder: Path) -> Path | None:
    """Return the calibration file of a checkpoint's or adapter's folder, if it has one."""
    path = folder / CALIBRATION_FILE
    return path if path.is_file() else None


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
