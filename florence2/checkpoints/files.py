"""A checkpoint's files, before any tensor is read: their names, strict JSON, files written whole, and `tasks.json`.

JSON is read strictly: its size is limited, no field is ignored, and all problems are reported at once. Nothing here
imports torch.
"""

import hashlib
import json
import os
import secrets
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from florence2.errors import (
    CheckpointError,
    ConfigError,
    Florence2Error,
    OutputError,
    PromptError,
    clip,
    listing,
    shown,
)
from florence2.inputs.files import LFS_POINTER, lfs_problem
from florence2.inputs.tasks import Task, TaskTable, default_input, token_task
from florence2.model.config import MAX_NUMBER as MAX_NUMBER
from florence2.model.config import as_kind

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
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

MAX_JSON_BYTES = 16 << 20
"""The largest settings file that is read; Python needs up to 25 times as much memory for it."""
MAX_NAME_BYTES = 255
"""The longest file name that common file systems take, in bytes of UTF-8."""
MAX_TASKS_BYTES, MAX_TASKS = 1 << 20, 1000


def checkpoint_folder(path: Path) -> Path:
    """Return the folder that holds the configuration and tokenizer of `path`, a folder or a weight file."""
    return path if path.is_dir() else path.parent


def find_weight_files(path: Path, allow_pickle: bool = False) -> tuple[tuple[Path, ...], bool]:
    """Return the weight files that `path` means and whether they are pickles.

    `path` is a folder, one weight file, or the index of a sharded set.

    In a folder, `model.safetensors` takes precedence over an index, and an index over a single other `.safetensors`.
    A `.bin` is taken only with `allow_pickle`, and in a folder only where it has no safetensors.

    Raises:
        CheckpointError: `path` holds no weights, several sets of them, or only a pickle that is not allowed.
    """
    if path.is_file():
        return _read_weight_file(path, allow_pickle)
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist; give a folder, a weight file, or an index of shards.")
    for name in (SAFETENSORS, f"{SAFETENSORS}.index.json"):
        if (path / name).is_file():
            return _read_weight_file(path / name, allow_pickle)
    single = sorted(path.glob("*.safetensors"))
    if len(single) == 1:
        return (single[0],), False
    if single:
        raise CheckpointError(
            f"{path} holds several weight files and no index: {listing([file.name for file in single])}; name one."
        )
    for name in (PICKLE, f"{PICKLE}.index.json"):
        if (path / name).is_file():
            return _read_weight_file(path / name, allow_pickle)
    raise CheckpointError(f"{path} holds no weights: no {SAFETENSORS}, no index of shards, no {PICKLE}.")


def _read_weight_file(path: Path, allow_pickle: bool) -> tuple[tuple[Path, ...], bool]:
    """Return the weight files that a file means, and whether they are pickles; refuse those without `allow_pickle`."""
    index = path.name.endswith(".index.json")
    pickled = not path.name.startswith(SAFETENSORS) if index else path.suffix in PICKLE_SUFFIXES
    if pickled and not allow_pickle:
        raise CheckpointError(
            f"{path.parent} holds its weights only as a pickle, {path.name}. Allow it with --allow-pickle "
            f"(allow_pickle=True), or convert it once: `florence2 convert {path} OUT --allow-pickle`."
        )
    return (_read_index(path) if index else (path,)), pickled


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
        raise CheckpointError(f"{path} points outside its folder: {listing(outside)}.")
    # a name that is too long cannot exist, and asking for it raises an OSError
    missing = [shard for shard in shards if clip_name(shard) != shard or not (path.parent / shard).is_file()]
    if missing:
        raise CheckpointError(f"{path} lists shards that do not exist: {listing(missing)}.")
    return tuple(path.parent / shard for shard in shards)


def clip_name(name: str, most: int = MAX_NAME_BYTES) -> str:
    """Return the part of a file name that fits into `most` bytes, without half a letter at its end."""
    encoded = name.encode("utf-8", "surrogatepass")
    return name if len(encoded) <= most else encoded[:most].decode("utf-8", "ignore")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Yield a file name in the same folder; rename it to `path` when the block succeeds, remove it otherwise.

    The new file gets the permissions of the process' umask, whatever the block did to it. Raises OutputError, which is
    an OSError too, when it cannot be written.
    """
    draft = path.parent / f".{clip_name(path.name, 100)}.{secrets.token_hex(6)}"
    try:
        os.close(os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))  # the process' umask applies
        mode = draft.stat().st_mode
        yield draft
        if draft.stat().st_mode != mode:  # safetensors replaces it with a file that only the owner may read
            draft.chmod(stat.S_IMODE(mode))
        draft.replace(path)
    except OutputError:
        raise
    except OSError as error:
        raise cannot_write(path, error.strerror or str(error)) from None
    finally:
        with suppress(OSError):
            draft.unlink()


def cannot_write(path: Path, reason: str) -> OutputError:
    """Return the error of a file that cannot be written."""
    return OutputError(
        f"{path} cannot be written: {reason}. Make room on the disk, or choose a folder where you may write.", reason
    )


@contextmanager
def new_files(folder: Path) -> Iterator[None]:
    """Create `folder` for the files that the block writes; remove them again if the block fails."""
    existed = folder.is_dir()
    before = set(folder.iterdir()) if existed else set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        if folder.is_dir():
            for path in set(folder.iterdir()) - before:
                path.unlink(missing_ok=True)
            if not existed:
                folder.rmdir()
        raise


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write one JSON object, whole or not at all."""
    with written_whole(path) as draft:
        draft.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def refuse_pointer(path: Path) -> None:
    """Raise CheckpointError where a clone without Git LFS has left a pointer in the place of a large file."""
    try:
        with path.open("rb") as file:
            start = file.read(len(LFS_POINTER))
    except OSError:
        return  # whoever reads the file says what is wrong with it
    if start == LFS_POINTER:
        raise CheckpointError(lfs_problem(path))


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal, as the Hub shows it for large files. Raises CheckpointError."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}.") from None
    return digest.hexdigest()


def read_json(path: Path, limit: int = MAX_JSON_BYTES, unique: bool = False) -> dict[str, Any]:
    """Read one JSON object of at most `limit` bytes from the regular file `path`; `unique` refuses repeated keys.

    Raises ConfigError for anything else.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait, and a device may never end
            raise ConfigError(f"{path} cannot be read as JSON: it is not a regular file.")
        with path.open("rb") as file:
            content = file.read(limit + 1)  # the size that a file states may be wrong, as in /proc
        if len(content) > limit:
            raise ConfigError(f"{path} is larger than {limit >> 20} MiB, the limit for such a file.")
        refuse_pointer(path)
        values = json.loads(content.decode("utf-8"), object_pairs_hook=_unique_keys if unique else None)
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist; a checkpoint folder needs it next to the weights.") from None
    except Florence2Error:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a JSON object, not {shown(values)}.")
    return values


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of JSON `pairs`. Raises ValueError for a key that occurs twice."""
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {shown(next(name for name in names if names.count(name) > 1))} occurs twice")
    return values


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any], ignored: Collection[str] = ()) -> str:
    """List the keys whose values differ, "batch was 4 and is 2; ..."; an empty text when none do."""
    changed = [key for key in {**before, **now} if key not in ignored and before.get(key) != now.get(key)]
    return "; ".join(f"{key} was {shown(before.get(key), 200)} and is {shown(now.get(key), 200)}" for key in changed)


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
                self.problems.append(f"{self.name} lacks {shown(key)}")
            return default[0] if default else _placeholder(kind)
        value = as_kind(kind, self.values.pop(key))
        if type(value) is not kind:
            self.problems.append(f"{self.name}.{key} must be {kind.__name__}, not {shown(value)}")
            return _placeholder(kind)
        if isinstance(value, int | float) and not 0 <= value <= MAX_NUMBER:
            self.problems.append(f"{self.name}.{key} must be a number from 0 to 2**53, but is {shown(value)}")
            return _placeholder(kind)
        return value

    def take_tuple(self, key: str, kind: type, *default: list[Any]) -> tuple[Any, ...]:
        """Return the value of `key`, a list whose items must all be of type `kind`, and finite if they are numbers."""
        values = [as_kind(kind, value) for value in self.take(key, list, *default)]
        if any(type(value) is not kind or not _is_finite(value) for value in values):
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
                self.problems.append(f"{self.name}.{key} is {shown(value)}; {_implemented(allowed)}")
            elif allowed is None and key not in inert:
                self.problems.append(f"{self.name}.{clip(key, 60)} is an unknown field (value {shown(value)})")


def _implemented(allowed: Sequence[Any]) -> str:
    """Return the clause about the values that a field may have; null and empty ones mean the same as the usual one."""
    usual, *others = allowed
    named = [shown(usual), *(shown(value) for value in others if value not in (None, [], {}))]
    if len(named) == 1:
        return f"only {named[0]} is implemented"
    return f"only {', '.join(named[:-1])} and {named[-1]} are implemented"


def _is_finite(value: Any) -> bool:
    """Return whether a value is anything but a float that is NaN, infinite or too large to compute with."""
    return not isinstance(value, float) or abs(value) <= MAX_NUMBER


def _placeholder(kind: type) -> Any:
    """Return a stand-in for an unusable value, so that reading continues and finds every problem."""
    return kind() if kind is not int else 1


def adapter_folder(path: Path) -> Path:
    """Return the folder of an adapter, which may be given as one of its files. Raises ConfigError for another file."""
    if not path.is_file():
        return path
    if path.name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS, "adapter_model.bin"):
        return path.parent
    raise ConfigError(
        f"The adapter {path} is a file; give the folder that holds {ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, as peft "
        "saves them."
    )


def read_tasks(folder: Path, adapter: Path | None = None) -> tuple[Task, ...]:
    """Read a checkpoint's own tasks from `tasks.json` of `folder`, and of an adapter's folder; none without that file.

    The file is data and holds no code:

        {"tasks": [{"token": "<COUNT>", "sentence": "How many {input}?", "answer": "text", "takes": "text"},
                   {"token": "<VQA>"}]}

    Without a sentence the model reads the token itself, as in `token_task`. `answer` and `takes` may be missing, as in
    `register_task`. Raises ConfigError listing every problem.
    """
    own = _read_tasks_file(folder / TASKS_FILE)
    if adapter is None:
        return own
    try:
        return TaskTable((*own, *_read_tasks_file(adapter / TASKS_FILE))).own
    except PromptError as error:
        raise ConfigError(f"{adapter / TASKS_FILE} does not fit the model: {error}") from None


def _read_tasks_file(path: Path) -> tuple[Task, ...]:
    if not path.is_file():
        return ()
    problems: list[str] = []
    top = Fields("the file", read_json(path, MAX_TASKS_BYTES), problems)
    items = top.take("tasks", list)
    if len(items) > MAX_TASKS:
        problems.append(f"it has {len(items):,} tasks; at most {MAX_TASKS:,} are read")
    tasks = [_read_task(Fields(f"tasks[{i}]", item, problems)) for i, item in enumerate(items[:MAX_TASKS])]
    top.finish()
    if not problems:
        try:
            return TaskTable(tasks).own
        except PromptError as error:
            problems.append(str(error).removesuffix("."))
    raise ConfigError(f"{path}: {listing(problems, '; ')}.")


def _read_task(fields: Fields) -> Task:
    token, answer = fields.take("token", str), fields.take("answer", str, "text")
    if fields.values.get("sentence") is None:
        fields.values.pop("sentence", None)
        task = token_task(token, answer, fields.take("takes", str, "anything"))
    else:
        sentence = fields.take("sentence", str)
        task = Task(token, sentence, answer, fields.take("takes", str, default_input(sentence)))
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
