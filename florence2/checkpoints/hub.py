"""A name -> files: the only place that touches the network.

All transfers are huggingface_hub's, so its cache, token, endpoint and offline switches (`HF_HOME`, `HF_TOKEN`,
`HF_ENDPOINT`, `HF_HUB_OFFLINE`) hold. Only configuration, tokenizer and weights are fetched; code never is.
"""

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from florence2.checkpoints.adapters import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from florence2.checkpoints.checkpoint import COMPANIONS
from florence2.checkpoints.tensors import SAFETENSORS, find_weights
from florence2.errors import CheckpointError, HubError

NAMES = {
    "base": "microsoft/Florence-2-base",
    "large": "microsoft/Florence-2-large",
    "base-ft": "microsoft/Florence-2-base-ft",
    "large-ft": "microsoft/Florence-2-large-ft",
}
DEFAULT_MODEL = "base"
EMBEDDED_MODEL = "nano"
"""A specimen that comes with the package: made-up scenes only, see `weights/nano/README.md`."""

_BESIDE_WEIGHTS = frozenset(("config.json", "generation_config.json", *COMPANIONS))
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))\w[\w.-]{0,94}(?<![.-])/\w[\w.-]{0,94}(?<![.-])", re.ASCII)


def resolve(
    name: str | os.PathLike[str],
    revision: str | None = None,
    local_files_only: bool = False,
    allow_pickle: bool = False,
) -> Path:
    """A short name, Hub id, folder or file -> a local path.

    A path that exists is never looked up elsewhere; the short names go before paths, so a folder called "base" is
    reached as "./base". "nano" is the specimen that comes with the package. A name that the Hub's cache holds whole
    is taken from there without asking the network; `download` is what refreshes it. Raises HubError for a name that
    is nothing of this.
    """
    text = os.fspath(name)
    path = _embedded_folder() if text == EMBEDDED_MODEL else Path(text)
    if text and text not in NAMES and _exists(path):
        if revision is not None:
            raise HubError(f"{text} is a local path, which has no revisions; leave out {revision!r}.")
        return path
    if text not in NAMES and not _HUB_ID.fullmatch(text):
        names = ", ".join((EMBEDDED_MODEL, *NAMES))
        raise HubError(f"{text!r} is no existing path, none of the names {names}, and not of the form OWNER/NAME.")
    return _find_in_cache(text, revision, allow_pickle) or download(text, revision, local_files_only, allow_pickle)


def resolve_adapter(name: str | os.PathLike[str], local_files_only: bool = False) -> Path:
    """A folder or Hub id of a LoRA adapter -> its folder.

    A path that exists is never looked up elsewhere, and an adapter that the Hub's cache holds is taken from there.
    Raises HubError with the remedy.
    """
    text = os.fspath(name)
    if text and _exists(text):
        return Path(text)
    if not _HUB_ID.fullmatch(text):
        raise HubError(f"The adapter {text!r} is no existing folder and not of the form OWNER/NAME.")
    import huggingface_hub
    from huggingface_hub import constants

    files = [ADAPTER_CONFIG, ADAPTER_WEIGHTS]
    cached = all(_is_cached(text, file, None) for file in files)
    if not cached and (local_files_only or constants.HF_HUB_OFFLINE):
        raise HubError(f"The adapter {text} is not in the local cache, and this run is offline; give a local folder.")
    try:
        return Path(huggingface_hub.snapshot_download(text, allow_patterns=files, local_files_only=cached))
    except Exception as error:  # noqa: BLE001  as in `download`
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise HubError(f"The adapter {text} cannot be fetched ({reason}); check the name, or give a folder.") from None


def _embedded_folder() -> Path:
    """Where the specimen is: inside an installed package, or beside it in a source tree."""
    inside, beside = (Path(__file__).parents[i] / "weights" / EMBEDDED_MODEL for i in (1, 2))
    return inside if inside.is_dir() else beside


def _exists(path: str | Path) -> bool:
    try:
        return Path(path).exists()
    except (OSError, ValueError):  # too long for a path, or not one
        return False


def download(
    name: str, revision: str | None = None, local_files_only: bool = False, allow_pickle: bool = False
) -> Path:
    """Fetch a checkpoint by short name or Hub id into the Hub's cache; return its folder there.

    `revision` is a branch, tag or commit; None is the repository's main branch. Files that the cache has are not
    fetched again; with `local_files_only`, or offline, none are. `allow_pickle` takes a `.bin` where there are no
    safetensors. What is to be fetched, and its size, is said on stderr first, and progress is shown there.
    Raises HubError with the remedy.
    """
    if name == EMBEDDED_MODEL:
        return resolve(name, revision)
    import huggingface_hub  # here, because importing it takes longer than the rest of this package
    from huggingface_hub import constants

    repository = NAMES.get(name, name)
    if local_files_only or constants.HF_HUB_OFFLINE:
        found = _find_in_cache(name, revision, allow_pickle)
        if found is None:
            raise HubError(_absent(name, revision, "and this run is offline"))
        return found
    try:
        info = huggingface_hub.HfApi().model_info(repository, revision=revision, files_metadata=True)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        wanted = _choose_files(repository, sizes, allow_pickle)
        new = [file for file in wanted if not _is_cached(repository, file, info.sha)]
        total = sum(sizes[file] for file in new) / 1e6
        print(
            f"{repository}: {len(new)} of {len(wanted)} files to fetch, {total:,.0f} MB, to {constants.HF_HUB_CACHE}",
            file=sys.stderr,
        )
        return Path(huggingface_hub.snapshot_download(repository, revision=revision, allow_patterns=wanted))
    except HubError:
        raise
    except Exception as error:  # noqa: BLE001  the library's own errors, its HTTP client's and the operating system's
        raise _explain(error, name, revision) from None


def _choose_files(repository: str, names: Iterable[str], allow_pickle: bool) -> list[str]:
    """The files of a repository that a checkpoint consists of, never code. Raises HubError when weights are lacking."""
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
    return weights + [name for name in top if name in _BESIDE_WEIGHTS]


def _find_in_cache(name: str, revision: str | None, allow_pickle: bool) -> Path | None:
    """The cached folder of `name`, if everything that loading needs is there."""
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(NAMES.get(name, name), "config.json", revision=revision)
    if not isinstance(config, str):
        return None
    folder = Path(config).parent
    try:
        find_weights(folder, allow_pickle)
    except CheckpointError:
        return None
    settings = ("preprocessor_config.json", "processor_config.json")
    whole = (folder / "tokenizer.json").is_file() and any((folder / name).is_file() for name in settings)
    return folder if whole else None


def _is_cached(repository: str, file: str, commit: str | None) -> bool:
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, file, revision=commit), str)


def _explain(error: Exception, name: str, revision: str | None) -> HubError:
    from huggingface_hub import errors

    repository = NAMES.get(name, name)
    if isinstance(error, errors.GatedRepoError):
        return HubError(f"{repository} asks for its terms to be accepted on the Hub first; then set HF_TOKEN.")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(
            f"There is no path and no public repository {repository!r}. Check the name; for a private one set HF_TOKEN."
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"{repository} has no revision {revision!r}; give a branch, a tag or a full commit hash.")
    reason = str(error).strip().split("\n")[0] or type(error).__name__
    return HubError(_absent(name, revision, f"and fetching it failed ({reason})"))


def _absent(name: str, revision: str | None, why: str) -> str:
    at = f" at revision {revision}" if revision else ""
    return (
        f"{NAMES.get(name, name)}{at} is not in the local cache, {why}. Get it with `florence2 download {name}` on a "
        "machine with internet access, or give the path of a folder that holds it."
    )
