"""A checkpoint's files, before any tensor is read: their names, strict JSON, files written whole, and `tasks.json`.

JSON is read strictly: its size is limited, no field is ignored, and all problems are reported at once. Nothing here
imports torch.
"""

import contextlib
import json
import math
import os
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from florence2.errors import CheckpointError, ConfigError, PromptError, shown
from florence2.inputs.tasks import Task, TaskTable, default_input

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TASKS_FILE = "tasks.json"
COMPANIONS = (
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    TASKS_FILE,
    "LICENSE",
)
"""What belongs next to the configuration and the weights."""

MAX_JSON_BYTES = 64 << 20


def checkpoint_folder(path: Path) -> Path:
    """Return the folder that holds the configuration and tokenizer of `path`, a folder or a weight file."""
    return path if path.is_dir() else path.parent


def find_weight_files(path: Path, allow_pickle: bool = False) -> tuple[tuple[Path, ...], bool]:
    """Return the weight files that `path` means and whether they are pickles.

    `path` is a folder, one weight file, or the index of a sharded set.

    In a folder, `model.safetensors` takes precedence over an index, and an index over a single other `.safetensors`.
    A `.bin` is taken when `path` names it, or with `allow_pickle` in a folder without safetensors.

    Raises:
        CheckpointError: `path` holds no weights, several sets of them, or only a pickle that is not allowed.
    """
    if path.is_file():
        if path.name.endswith(".index.json"):
            return _read_index(path), not path.name.startswith(SAFETENSORS)
        return (path,), path.suffix in (".bin", ".pt", ".pth")
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder, a weight file, or an index of shards.")
    for name in (SAFETENSORS, f"{SAFETENSORS}.index.json"):
        if (path / name).is_file():
            return find_weight_files(path / name)
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return (single[0],), False
    if single:
        raise CheckpointError(
            f"{path} holds several weight files and no index: {', '.join(file.name for file in single)}; name one."
        )
    for name in (PICKLE, f"{PICKLE}.index.json"):
        if (path / name).is_file() and not allow_pickle:
            raise CheckpointError(
                f"{path} holds its weights only as a pickle, {name}. Convert it to safetensors with "
                f"`florence2 convert {path / name} OUT`, or allow it with allow_pickle=True."
            )
        if (path / name).is_file():
            return find_weight_files(path / name)
    raise CheckpointError(f"{path} holds no weights: no {SAFETENSORS}, no index of shards, no {PICKLE}.")


def _read_index(path: Path) -> tuple[Path, ...]:
    """Return the shards that an index lists."""
    try:
        weight_map = read_json(path).get("weight_map")
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{path} has no weight_map from tensor names to file names.")
    shards = sorted(set(weight_map.values()))
    outside = [shard for shard in shards if Path(shard).name != shard]
    if outside:
        raise CheckpointError(f"{path} points outside its folder: {', '.join(outside)}.")
    # a name of more than 255 characters cannot exist, and asking for it raises an OSError
    missing = [shard for shard in shards if len(shard) > 255 or not (path.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{path} lists shards that do not exist: {', '.join(missing)}.")
    return tuple(path.parent / shard for shard in shards)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file name in the same folder; rename it to `path` when the block succeeds, remove it otherwise.

    The new file gets the permissions of the process' umask, whatever the block did to it.
    """
    draft = path.parent / f".{path.name[:100]}.{secrets.token_hex(6)}"
    os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the process' umask applies
    mode = draft.stat().st_mode
    try:
        yield draft
        if draft.stat().st_mode != mode:  # safetensors replaces it with a file that only the owner may read
            draft.chmod(stat.S_IMODE(mode))
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object of at most 64 MiB from `path`. Raises ConfigError for a missing file or anything else."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ConfigError(f"{path} is larger than {MAX_JSON_BYTES >> 20} MiB, the limit for a configuration file.")
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder needs it next to the weights.") from None
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
    """A JSON object being read: each field is taken once, and a field that is never taken is a problem."""

    def __init__(self, name: str, values: Any, problems: list[str]):
        self.name, self.problems = name, problems
        self.values = dict(values) if isinstance(values, Mapping) else {}
        if not isinstance(values, Mapping):
            problems.append(f"{name} must be a JSON object, not {shown(values)}")

    def take(self, key: str, kind: type, *default: Any) -> Any:
        """Return the value of `key`, which must be of type `kind`; without a `default`, its absence is a problem."""
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
        """Return the value of `key`, a list whose items must all be of type `kind`."""
        values = [_as(kind, value) for value in self.take(key, list)]
        if any(type(value) is not kind for value in values):
            self.problems.append(f"{self.name}.{key} must be a list of {kind.__name__}, not {shown(values)}")
            return ()
        return tuple(values)

    def finish(self, inert: Collection[str] = (), fixed: Mapping[str, tuple[Any, ...]] | None = None) -> None:
        """Refuse every field that was not taken.

        `inert` names fields that may hold any value; `fixed` the only values that a field may hold, the usual first.
        """
        for key, value in self.values.items():
            allowed = (fixed or {}).get(key)
            if allowed is not None and value not in allowed:
                self.problems.append(f"{self.name}.{key} is {shown(value)}; only {shown(allowed[0])} is implemented")
            elif allowed is None and key not in inert:
                self.problems.append(f"{self.name}.{key} is an unknown field (value {shown(value)})")


def _as(kind: type, value: Any) -> Any:
    """Turn a whole number into the float that is wanted; return other values, and numbers too large, unchanged."""
    with contextlib.suppress(OverflowError):
        return float(value) if kind is float and type(value) is int else value
    return value


def _placeholder(kind: type) -> Any:
    """Return a stand-in for an unusable value, so that reading continues and finds every problem."""
    return kind() if kind is not int else 1


def read_tasks(folder: Path) -> tuple[Task, ...]:
    """Read the checkpoint's own tasks from `tasks.json` of `folder`; none without that file.

    The file is data and holds no code:

        {"tasks": [{"token": "<COUNT>", "sentence": "How many {input}?", "answer": "text", "takes": "text"}]}

    `answer` and `takes` may be missing, as in `register_task`. Raises ConfigError listing every problem.
    """
    path = folder / TASKS_FILE
    if not path.is_file():
        return ()
    problems: list[str] = []
    top = Fields("the file", read_json(path), problems)
    tasks = [_read_task(Fields(f"tasks[{i}]", item, problems)) for i, item in enumerate(top.take("tasks", list))]
    top.finish()
    if not problems:
        try:
            return TaskTable(tasks).own
        except PromptError as error:
            problems.append(str(error).removesuffix("."))
    raise ConfigError(f"{path}: {'; '.join(problems)}.")


def _read_task(fields: Fields) -> Task:
    sentence = fields.take("sentence", str)
    answer, takes = fields.take("answer", str, "text"), fields.take("takes", str, default_input(sentence))
    task = Task(fields.take("token", str), sentence, answer, takes)
    fields.finish()
    return task


def write_tasks(folder: Path, tasks: TaskTable | Iterable[Task]) -> None:
    """Write a model's own tasks to `tasks.json` of `folder`; without any, remove the file.

    Raises PromptError for tasks that `read_tasks` would refuse.
    """
    own = (tasks if isinstance(tasks, TaskTable) else TaskTable(tasks)).own
    if own:
        write_json(folder / TASKS_FILE, {"tasks": [asdict(task) for task in own]})
    else:
        (folder / TASKS_FILE).unlink(missing_ok=True)
