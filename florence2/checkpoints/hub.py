"""From a name to files: the only module that uses the network.

All transfers are huggingface_hub's, so its cache, token, endpoint and offline switches (`HF_HOME`, `HF_TOKEN`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`) apply. Only configuration, tokenizer and weights are fetched, never code. Nothing here
imports torch, and huggingface_hub is imported only when a name of the Hub is looked up.
"""

import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from florence2.checkpoints.checks.calibration import CALIBRATION_FILE
from florence2.checkpoints.files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    COMPANIONS,
    PICKLE_SUFFIXES,
    SAFETENSORS,
    TASKS_FILE,
    adapter_folder,
    find_weight_files,
)
from florence2.errors import CheckpointError, HubError, shown

NAMES = {
    "base": "microsoft/Florence-2-base",
    "large": "microsoft/Florence-2-large",
    "base-ft": "microsoft/Florence-2-base-ft",
    "large-ft": "microsoft/Florence-2-large-ft",
}
DEFAULT_MODEL = "base"
EMBEDDED_MODEL = "nano"
"""A small model that comes with the package, trained on synthetic scenes only; see `weights/nano/README.md`."""

_NEXT_TO_WEIGHTS = frozenset(("config.json", "generation_config.json", CALIBRATION_FILE, *COMPANIONS))
_RUN_FOLDER = re.compile(r"checkpoint(?:-[0-9]+)?")
_FILE_SUFFIXES = (".gguf", ".onnx", ".safetensors", ".json", *PICKLE_SUFFIXES)
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,94}(?<![.-])/\w[\w.-]{0,94}(?<![.-])", re.ASCII)


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Return the local path of a checkpoint; fetch it from the Hub when it is not on this machine.

    A path never touches the network, whether it exists or not (see `is_hub_id`), and neither does a name that the
    Hub's cache holds completely; `download` refreshes that. Short names take precedence over paths: a folder called
    "base" is reached as "./base".

    Args:
        name: A short name ("base", "large", "base-ft", "large-ft", or "nano", which comes with the package), a Hub id
            OWNER/NAME, a folder, a weight file, or an index of shards.
        revision: A branch, tag or commit on the Hub; None is the main branch.
        local_files_only: Fetch nothing.
        allow_pickle: Accept a `.bin` where there are no safetensors.
        report: Called with a line about the files to fetch, before they are fetched.

    Raises:
        HubError: The name means nothing, a path got a revision, or fetching failed.
    """
    found = find_checkpoint(name, revision, allow_pickle)
    return found or download(os.fspath(name), revision, local_files_only, allow_pickle, report)


def find_checkpoint(
    name: str | os.PathLike[str], revision: str | None = None, allow_pickle: bool = False
) -> Path | None:
    """Return the local path of a checkpoint, or None where it must be fetched. Raises HubError as `resolve`."""
    text = os.fspath(name)
    local = _find_local(text, revision)
    if local is not None:
        return local
    if text not in NAMES and not is_hub_id(text):
        raise HubError(_unknown(text))
    return _find_in_cache(text, revision, allow_pickle)


def find_adapter(name: str | os.PathLike[str]) -> Path | None:
    """Return the folder of an adapter on this machine, or None where it must be fetched."""
    text = os.fspath(name)
    if text and _exists(text):
        return adapter_folder(Path(text))
    if not is_hub_id(text):
        return None
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(text, ADAPTER_CONFIG)
    return Path(config).parent if isinstance(config, str) else None


def is_hub_id(text: str) -> bool:
    """Return whether a name that does not exist on this machine may be sent to the Hub.

    It must be OWNER/NAME, and must not be a mistyped path: where a folder OWNER exists here, or NAME is one that a
    training run gives its folders, it is taken for one.
    """
    if not _HUB_ID.fullmatch(text) or Path(text).suffix in _FILE_SUFFIXES:
        return False
    owner, _, name = text.partition("/")
    return not os.path.lexists(owner) and not _RUN_FOLDER.fullmatch(name)


def _unknown(text: str) -> str:
    """Return the sentence about a name that is neither on this machine nor one to look up."""
    if _HUB_ID.fullmatch(text) and os.path.lexists(text.partition("/")[0]):
        reason = f"{text.partition('/')[0]} is a folder here, so this is taken for a path and not looked up on the Hub"
    elif _HUB_ID.fullmatch(text) and _RUN_FOLDER.fullmatch(text.rpartition("/")[2]):
        reason = "a training run gives its folders such names, so this is not looked up on the Hub"
    else:
        reason = f"it is not one of the names {', '.join((EMBEDDED_MODEL, *NAMES))}, and not a Hub id OWNER/NAME"
    return f"{shown(text, 300)} is not an existing path: {reason}. Check the path."


def resolve_adapter(name: str | os.PathLike[str], local_files_only: bool = False) -> Path:
    """Return the folder of a LoRA adapter; fetch it from the Hub when it is not on this machine.

    Args:
        name: A folder, one of its files `adapter_model.safetensors` and `adapter_config.json`, or a Hub id OWNER/NAME.
        local_files_only: Fetch nothing.

    Raises:
        HubError: The name means nothing, or fetching failed.
        ConfigError: The name is another file.
    """
    text = os.fspath(name)
    if text and _exists(text):
        return adapter_folder(Path(text))
    if not is_hub_id(text):
        raise HubError(f"The adapter {_unknown(text)}")
    import huggingface_hub
    from huggingface_hub import constants

    files = [ADAPTER_CONFIG, ADAPTER_WEIGHTS, TASKS_FILE]
    cached = all(_is_cached(text, file, None) for file in files[:2])
    if not cached and (local_files_only or constants.HF_HUB_OFFLINE):
        raise HubError(f"The adapter {text} is not in the local cache, and this run is offline; give a local folder.")
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=files, local_files_only=cached))
    except Exception as error:  # noqa: BLE001  as in `download`
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise HubError(f"The adapter {text} cannot be fetched ({reason}); check the name, or give a folder.") from None


def download(
    name: str,
    revision: str | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
    report: Callable[[str], None] | None = None,
) -> Path:
    """Fetch a checkpoint into the Hub's cache and return its folder there.

    Files that the cache holds are not fetched again. huggingface_hub shows its own progress bars.

    Args:
        name: A short name or a Hub id; "nano" is returned from the package.
        revision: A branch, tag or commit; None is the main branch.
        local_files_only: Fetch nothing, as when offline: return what the cache holds.
        allow_pickle: Accept a `.bin` where there are no safetensors.
        report: Called once, before anything is fetched, with a line that says how many files and megabytes are to be
            fetched, and where to.

    Raises:
        HubError: The repository, the revision or its weights do not exist, or fetching failed.
    """
    if name == EMBEDDED_MODEL:
        return _find_embedded(revision)
    import huggingface_hub  # here, because importing it takes longer than the rest of this package
    from huggingface_hub import constants

    if name not in NAMES and not is_hub_id(name):
        raise HubError(_unknown(name))
    repository = NAMES.get(name, name)
    if local_files_only or constants.HF_HUB_OFFLINE:
        cached = _find_in_cache(name, revision, allow_pickle)
        if cached is None:
            raise HubError(_absent(name, revision, "and this run is offline"))
        return cached
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = _choose_files(repository, sizes, allow_pickle)
        new = [file for file in wanted if not _is_cached(repository, file, info.sha)]
        if report is not None:
            megabytes = sum(sizes[file] for file in new) / 1e6
            progress = f"{len(new)} of {len(wanted)} files to fetch, {megabytes:,.0f} MB"
            report(f"{repository}: {progress}, to {constants.HF_HUB_CACHE}")
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except HubError:
        raise
    except Exception as error:  # noqa: BLE001  the library's own errors, its HTTP client's and the operating system's
        raise _explain(error, name, revision) from None


def _find_local(text: str, revision: str | None) -> Path | None:
    """Return the path that a name stands for on this machine; None where the Hub must be asked."""
    if text == EMBEDDED_MODEL:
        return _find_embedded(revision)
    if not text or text in NAMES or not _exists(text):
        return None
    return _without_revision(Path(text), text, revision)


def _find_embedded(revision: str | None) -> Path:
    """Return the folder of the model that comes with the package."""
    inside, source_tree = (Path(__file__).parents[i] / "weights" / EMBEDDED_MODEL for i in (1, 2))
    return _without_revision(inside if inside.is_dir() else source_tree, EMBEDDED_MODEL, revision)


def _without_revision(path: Path, text: str, revision: str | None) -> Path:
    """Return `path`; refuse a revision, which only a repository has."""
    if revision is not None:
        raise HubError(f"{text} is on this machine, not on the Hub, and has no revisions; leave out {revision!r}.")
    return path


def _exists(path: str) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a path, or not a path at all
        return False


def _choose_files(repository: str, names: Iterable[str], allow_pickle: bool) -> list[str]:
    """Choose the files of a repository that make up a checkpoint, never code. Raises HubError for missing weights."""
    top = [name for name in names if "/" not in name]
    safetensors = [name for name in top if name.endswith((".safetensors", ".safetensors.index.json"))]
    pickles = [name for name in top if re.fullmatch(r"pytorch_model.*\.bin(\.index\.json)?", name)]
    if SAFETENSORS in safetensors:
        safetensors = [SAFETENSORS]
    if not safetensors and pickles and not allow_pickle:
        raise HubError(
            f"{repository} has its weights only as a pickle, {pickles[0]}; allow it with --allow-pickle "
            "(allow_pickle=True), which reads tensors and runs no code."
        )
    weights = safetensors or pickles
    if not weights:
        raise HubError(f"{repository} holds no weights, neither safetensors nor a pytorch_model.bin.")
    return weights + [name for name in top if name in _NEXT_TO_WEIGHTS]


def _find_in_cache(name: str, revision: str | None, allow_pickle: bool) -> Path | None:
    """Return the cached folder of `name` if everything that loading needs is in it."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(NAMES.get(name, name), "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        find_weight_files(folder, allow_pickle)
    except CheckpointError:
        return None
    settings = ("preprocessor_config.json", "processor_config.json")
    complete = (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in settings)
    return folder if complete else None


def _is_cached(repository: str, file: str, commit: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, revision=commit), str)


def _explain(error: Exception, name: str, revision: str | None) -> HubError:
    """Turn an error of the transfer into one that says what to do."""
    from huggingface_hub import errors

    repository = NAMES.get(name, name)
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repository} requires its terms to be accepted on the Hub first; then set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"Neither a path nor a public repository {repository!r} exists: no such folder is here, and the Hub does "
            "not show one. Check the name; for a private repository set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repository} has no revision {revision!r}; give a branch, a tag or a full commit hash.")
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return HubError(_absent(name, revision, f"and fetching it failed ({reason})"))


def _absent(name: str, revision: str | None, why: str) -> str:
    at = f" at revision {revision}" if revision else ""
    here = "" if name in NAMES else f"no folder {name} exists here, and "
    return (
        f"{here}{NAMES.get(name, name)}{at} is not in the local cache, {why}. Get it with `florence2 download {name}` "
        "on a machine with internet access, or give the path of a folder that holds it."
    )
