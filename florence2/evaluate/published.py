"""The published results of the four checkpoints, from `published.json`."""

import json
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.json")
MODELS = ("base", "large", "base-ft", "large-ft")
"""The names under which results are published."""


@cache
def _read() -> Any:
    return json.loads(FILE.read_text(encoding="utf-8"))


def published_source() -> str:
    """Return where the results were published."""
    return str(_read()["source"])


def published_results(model: str) -> dict[tuple[str, str, str], float]:
    """Return the results of one of `MODELS` by table, split and metric: percent, or CIDEr times 100."""
    place = MODELS.index(model)
    return {
        (row["table"], row["split"], row["metric"]): row["values"][place]
        for row in _read()["results"]
        if row["values"][place] is not None
    }


def published_splits() -> list[str]:
    """Return each split that has a result, as "TABLE:SPLIT"."""
    return [f"{row['table']}:{row['split']}" for row in _read()["results"]]


def published_note(model: str) -> str | None:
    """Return the sentence that must stand next to the results of a model, if there is one."""
    note: str | None = _read()["notes"].get(model)
    return note


def published_name(model: str) -> str | None:
    """Return the name in `MODELS` of a model that the command line names, None for another one."""
    name = model.removeprefix("microsoft/Florence-2-")
    return name if name in MODELS else None
