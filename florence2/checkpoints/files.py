"""Files written whole or not at all, and JSON read strictly: limited in size, nothing ignored, all problems at once."""

import json
import math
import os
import secrets
import stat
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from florence2.errors import ConfigError, shown

MAX_JSON_BYTES = 64 << 20


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A file name in the same folder, renamed to `path` when the block ends well and removed otherwise.

    The file may be read by whom the process' umask lets read, whatever the block did to it.
    """
    draft = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}"
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the process' umask applies
    mode = draft.stat().st_mode
    try:
        yield draft
        if draft.stat().st_mode != mode:  # safetensors puts a file in its place that only the owner may read
            draft.chmod(stat.S_IMODE(mode))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from `path`, at most 64 MiB. Raises ConfigError when it is absent or anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, the limit for a configuration file.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder needs it beside the weights.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {shown(values)}.")
    return values


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> str:
    """List the keys whose values differ, "batch was 4 and is 2; ..."; an empty text when none do."""
    changed = [key for key in {**before, **now} if key not in ignored and before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in changed)


class Fields:
    """One JSON object being read: each field is taken once, and what nobody took is a problem."""

    def __init__(self, name: str, values: Any, problems: list[str]):
        self.name, self.problems = name, problems
        self.values = dict(values) if isinstance(values, Mapping) else {}
        if not isinstance(values, Mapping):
            problems.append(f"{name} must be a JSON object, not {shown(values)}")

    def take(self, key: str, kind: type, *default: Any) -> Any:
        """The value of `key`, which must be of type `kind`; without a `default`, its absence is a problem."""
        if key not in self.values:
            if not default:
                self.problems.append(f"{self.name} lacks {key!r}")
            return default[0] if default else _placeholder(kind)
        value = _as(kind, self.values.pop(key))
        if type(value) is not kind:
            self.problems.append(f"{self.name}.{key} must be {kind.__name__}, not {shown(value)}")
            return _placeholder(kind)
        if isinstance(value, int | float) and not 0 <= value < math.inf:
            self.problems.append(f"{self.name}.{key} must be a finite number of at least 0, but is {value}")
        return value

    def take_tuple(self, key: str, kind: type) -> tuple[Any, ...]:
        """The value of `key`, a list of which every item must be of type `kind`."""
        values = [_as(kind, value) for value in self.take(key, list)]
        if any(type(value) is not kind for value in values):
            self.problems.append(f"{self.name}.{key} must be a list of {kind.__name__}, not {shown(values)}")
            return ()
        return tuple(values)

    def finish(self, inert: Collection[str] = (), fixed: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Refuse what was not taken.

        `inert` names fields that may say anything; `fixed` the only values that others may have, the usual one first.
        """
        for key, value in self.values.items():
            allowed = (fixed or {}).get(key)
            if allowed is not None and value not in allowed:
                self.problems.append(f"{self.name}.{key} is {shown(value)}; only {shown(allowed[0])} is implemented")
            elif allowed is None and key not in inert:
                self.problems.append(f"{self.name}.{key} is an unknown field (value {shown(value)})")


def _as(kind: type, value: Any) -> Any:
    """A whole number will do where a float is wanted."""
    return float(value) if kind is float and type(value) is int else value


def _placeholder(kind: type) -> Any:
    """Stands in for an unusable value, so that reading goes on and every problem is found."""
    return kind() if kind is not int else 1
