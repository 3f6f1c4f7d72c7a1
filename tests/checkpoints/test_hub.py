"""Names -> files, against a local server that speaks the Hub's protocol; each case in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import florence2
from florence2.checkpoints.hub import NAMES, download, find_checkpoint, is_hub_id, resolve, resolve_adapter
from florence2.errors import HubError
from tests.hub_server import COMMIT, Hub, serve
from tests.terminal import Done, type_command

WANTED = ["config.json", "model.safetensors", "preprocessor_config.json", "tokenizer.json"]


@pytest.fixture
def repository(small_folder: Path, tmp_path: Path) -> Path:
    """A repository as it is published: with code, pictures and an older pickle beside the weights."""
    folder = tmp_path / "repository"
    shutil.copytree(small_folder, folder)
    (folder / "modeling_florence2.py").write_text("raise SystemExit('this must never be fetched')")
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "README.md").write_text("card")
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.safetensors").write_bytes(b"other")
    return folder


@pytest.fixture
def hub(repository: Path) -> Iterator[Hub]:
    names = dict.fromkeys(
        ["microsoft/Florence-2-base", "someone/fine-tune", "someone/private", "someone/gated"], repository
    )
    with serve(Hub(names, gated=frozenset(["someone/gated"]), private=frozenset(["someone/private"]))) as server:
        yield server


class User:
    """Somebody at a terminal, with a home of their own."""

    def __init__(self, home: Path, url: str):
        self.home = home
        kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        self.environment = {**kept, "HF_HOME": str(home), "HF_ENDPOINT": url, "HF_HUB_DISABLE_TELEMETRY": "1"}

    def types(self, *arguments: str, **environment: str) -> Done:
        return type_command(arguments, {**self.environment, **environment})


@pytest.fixture
def user(tmp_path: Path, hub: Hub) -> User:
    return User(tmp_path / "home", hub.url)


def test_download_says_the_size_and_where_it_went(user: User, hub: Hub) -> None:
    done = user.types("download", "base")
    assert done.returncode == 0, done.stderr
    folder = Path(done.stdout.strip())
    assert folder.is_dir() and folder.is_relative_to(user.home) and COMMIT in str(folder)
    assert sorted(path.name for path in folder.iterdir()) == WANTED
    assert "microsoft/Florence-2-base: 4 of 4 files to fetch, " in done.stderr and " MB, to " in done.stderr
    assert hub.fetched() == WANTED  # no code, no pickle, nothing from folders below


def test_the_default_model_is_fetched_on_first_use_and_not_again(user: User, hub: Hub, picture_file: Path) -> None:
    command = ["run", "<CAPTION>", str(picture_file), "--max-new-tokens", "4"]
    cut = "florence2: 1 of 1 answer was cut off at --max-new-tokens 4; a larger number gives the rest.\n"
    first = user.types(*command)
    assert first.returncode == 0 and "microsoft/Florence-2-base" in first.stderr, first.stderr
    hub.requests.clear()
    second = user.types(*command)
    assert second.stdout == first.stdout and second.stderr == cut and hub.requests == []
    offline = user.types(*command, HF_HUB_OFFLINE="1")
    assert offline.stdout == first.stdout and hub.requests == []


def test_a_path_never_asks_the_network(user: User, hub: Hub, small_folder: Path, picture_file: Path) -> None:
    done = user.types("run", "od", str(picture_file), "--model", str(small_folder), "--max-new-tokens", "4")
    assert done.returncode == 0 and hub.requests == []


PATHS = [
    *(
        "./typo",
        "../typo",
        "~/typo",
        "/no/such/folder",
        "a\\b",
        "a/b/c",
        "run/checkpoint",
        "owner/name/",
        "owner//name",
    ),
    *("file/weights.safetensors", "someone/pytorch_model.bin", "someone/config.json", "typo", ".hidden/name", "", " "),
    *("https://huggingface.co/microsoft/Florence-2-base", "link/checkpoint", "owner//name", "owner/..", "owner/a--b"),
]


@pytest.mark.parametrize("name", PATHS)
def test_what_looks_like_a_path_is_never_sent_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi", forbidden)
    monkeypatch.setattr("huggingface_hub.snapshot_download", forbidden)
    for use in (resolve, find_checkpoint, resolve_adapter, download):
        with pytest.raises(HubError, match="is not an existing path: .*Check the path"):
            use(name)


def forbidden(*arguments: object, **named: object) -> None:
    raise AssertionError("this asks the network")


def test_a_mistyped_path_makes_no_request(user: User, hub: Hub, tmp_path: Path) -> None:
    """Counted by the server: only a name whose owner is not a folder here arrives."""
    for name in (f"{tmp_path}/typo", "./typo", "docs/typo", "tests/typo"):
        done = user.types("info", name)
        assert done.returncode == 2 and "is not an existing path" in done.stderr and "Traceback" not in done.stderr
    assert hub.requests == []
    done = user.types("info", "some/typo")
    assert done.returncode == 2 and "no such folder is here" in done.stderr and hub.requests


def test_a_folder_goes_after_the_short_name_of_its_name(
    small_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With "base" in the working folder, "base" is the published model and "./base" the folder."""
    shutil.copytree(small_folder, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(HubError, match="microsoft/Florence-2-base is not in the local cache"):
        resolve("base")
    assert resolve("./base") == Path("base")


@pytest.mark.release
@pytest.mark.parametrize("absent", ["tokenizer.json", "preprocessor_config.json"])
def test_a_cache_without_tokenizer_or_image_settings_is_not_whole(
    absent: str, user: User, hub: Hub, picture_file: Path
) -> None:
    folder = Path(user.types("download", "base").stdout.strip())
    (folder / absent).unlink()
    done = user.types("run", "od", str(picture_file), HF_HUB_OFFLINE="1")
    assert done.returncode == 2 and "is not in the local cache, and this run is offline" in done.stderr


def test_the_announced_size_is_that_of_the_files(repository: Path, user: User) -> None:
    with (repository / "model.safetensors").open("ab") as file:
        file.truncate(7_000_000)
    size = sum((repository / name).stat().st_size for name in WANTED) / 1e6
    assert 7 < size < 12
    done = user.types("download", "base")
    assert f"4 of 4 files to fetch, {size:,.0f} MB, to " in done.stderr


@pytest.mark.release  # several commands
def test_revisions(user: User, hub: Hub) -> None:
    for revision in ("v1", COMMIT):
        assert user.types("download", "someone/fine-tune", "--revision", revision).returncode == 0
    wrong = user.types("download", "someone/fine-tune", "--revision", "v9")
    assert wrong.returncode == 2 and "has no revision 'v9'" in wrong.stderr and "Traceback" not in wrong.stderr
    assert any("/revision/v1" in request for request in hub.requests)


@pytest.mark.release  # several commands
def test_a_token_opens_private_and_gated_repositories(user: User) -> None:
    private = user.types("download", "someone/private")
    assert private.returncode == 2 and "for a private repository set HF_TOKEN" in private.stderr
    gated = user.types("download", "someone/gated")
    assert gated.returncode == 2 and "terms to be accepted" in gated.stderr
    for name in ("someone/private", "someone/gated"):
        assert user.types("download", name, HF_TOKEN="hf_secret").returncode == 0


def test_what_does_not_exist(user: User) -> None:
    done = user.types("run", "od", "x.png", "--model", "some/typo")
    assert done.returncode == 2 and "Neither a path nor a public repository 'some/typo' exists" in done.stderr


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
def test_offline_and_absent_is_one_sentence_with_the_remedy(
    user: User, picture_file: Path, environment: dict[str, str]
) -> None:
    done = user.types("run", "od", str(picture_file), **environment)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "microsoft/Florence-2-base is not in the local cache" in last and "florence2 download base" in last


@pytest.mark.release
def test_a_connection_that_breaks_is_resumed_or_reported(user: User, hub: Hub) -> None:
    hub.fail_after_bytes = 50_000
    first = user.types("download", "base")
    assert first.returncode == 0 or "is not in the local cache" in first.stderr
    again = user.types("download", "base")
    assert again.returncode == 0
    folder = Path(again.stdout.strip())
    assert (folder / "model.safetensors").stat().st_size == (
        hub.repositories[NAMES["base"]] / "model.safetensors"
    ).stat().st_size


@pytest.mark.release
def test_a_half_filled_cache_is_not_taken_for_a_checkpoint(user: User, hub: Hub, picture_file: Path) -> None:
    folder = Path(user.types("download", "base").stdout.strip())
    (folder / "model.safetensors").unlink()
    done = user.types("run", "od", str(picture_file), "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr


@pytest.mark.release
def test_repositories_with_only_a_pickle(user: User, hub: Hub, repository: Path, picture_file: Path) -> None:
    torch.save(load_file(repository / "model.safetensors"), repository / "pytorch_model.bin")
    (repository / "model.safetensors").unlink()
    refused = user.types("download", "base")
    assert refused.returncode == 2 and "only as a pickle, pytorch_model.bin" in refused.stderr and hub.fetched() == []
    done = user.types("run", "od", str(picture_file), "--allow-pickle", "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert hub.fetched() == ["config.json", "preprocessor_config.json", "pytorch_model.bin", "tokenizer.json"]


def test_repositories_without_weights(user: User, repository: Path) -> None:
    (repository / "model.safetensors").unlink()
    (repository / "pytorch_model.bin").unlink()
    done = user.types("download", "base")
    assert done.returncode == 2 and "holds no weights" in done.stderr


@pytest.mark.release  # several commands
def test_sharded_repositories(user: User, hub: Hub, repository: Path, picture_file: Path) -> None:
    from tests.checkpoints.test_checkpoint import split_into_shards

    split_into_shards(repository)
    done = user.types("run", "od", str(picture_file), "--max-new-tokens", "4")
    assert done.returncode == 0, done.stderr
    assert [name for name in hub.fetched() if "model" in name] == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]


@pytest.mark.release  # several commands
def test_the_library_prints_nothing_of_its_own(user: User) -> None:
    """What is about to be fetched is reported to whoever asks for it; the bars are the Hub client's."""
    code = "from florence2.checkpoints.hub import resolve; lines = []; {}; print(lines)"
    calls = ["resolve('base')", "resolve('someone/fine-tune', report=lines.append)", "resolve('base', report=print)"]
    quiet, reported, cached = (
        subprocess.run(
            [sys.executable, "-c", code.format(call)],
            env={**user.environment, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
        for call in calls
    )
    assert (quiet.stdout, quiet.stderr) == ("[]\n", "")
    assert "someone/fine-tune: 4 of 4 files to fetch, " in reported.stdout and reported.stderr == ""
    assert (cached.stdout, cached.stderr) == ("[]\n", "")


def test_names_are_the_published_repositories() -> None:
    assert {name: f"microsoft/Florence-2-{name}" for name in NAMES} == NAMES


def test_an_adapter_is_fetched_once_and_then_found_offline(small_folder: Path, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 2}
    (published / "adapter_config.json").write_text(json.dumps(settings))
    path, model = "language_model.encoder.layers.0.fc1", florence2.load(small_folder).model
    rows, columns = model.get_submodule(path).weight.shape
    matrices = {f"{path}.lora_A.weight": torch.ones(2, columns), f"{path}.lora_B.weight": torch.ones(rows, 2)}
    save_file(matrices, published / "adapter_model.safetensors")
    (published / "optimizer.pt").write_bytes(b"this must never be fetched")
    with serve(Hub({"someone/adapter": published})) as hub:
        user = User(tmp_path / "home", hub.url)
        convert = ["convert", str(small_folder), "--adapter"]
        done = user.types(*convert, "someone/adapter", str(tmp_path / "a"))
        assert done.returncode == 0, done.stderr
        assert hub.fetched() == ["adapter_config.json", "adapter_model.safetensors"]
        hub.requests.clear()
        assert user.types(*convert, "someone/adapter", str(tmp_path / "b"), HF_HUB_OFFLINE="1").returncode == 0
        assert user.types(*convert, str(published), str(tmp_path / "c")).returncode == 0
        assert hub.requests == []
        offline = user.types(*convert, "someone/other", str(tmp_path / "d"), HF_HUB_OFFLINE="1")
        absent = user.types(*convert, "someone/other", str(tmp_path / "d"))
    files = [tmp_path / name / "model.safetensors" for name in ("a", "b", "c")]
    assert len({file.read_bytes() for file in [*files, small_folder / "model.safetensors"]}) == 2
    assert offline.returncode == 2 and "someone/other is not in the local cache" in offline.stderr
    assert absent.returncode == 2 and "The adapter someone/other cannot be fetched" in absent.stderr


@pytest.mark.parametrize("name", ["-", "é.png", "", "a/b/c", "a\udcffb"])
def test_a_name_that_the_hub_cannot_have_is_not_looked_up(name: str) -> None:
    with pytest.raises(HubError, match="not one of the names nano, base.* and not a Hub id OWNER/NAME"):
        download(name, local_files_only=True)


@pytest.mark.parametrize("name", ["run/checkpoint", "runs/checkpoint-500", "models/x.gguf", "models/x.onnx"])
def test_a_mistyped_path_of_a_run_is_not_sent_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_hub_id(name) and is_hub_id("owner/name") and is_hub_id("owner/my-adapter")
    reason = "a training run gives its folders such names" if "checkpoint" in name else "it is not one of the names"
    with pytest.raises(HubError, match=f"is not an existing path: {reason}"):
        resolve(name)
    with pytest.raises(HubError, match="is not an existing path: it is not one of the names"):
        resolve("deep/run/checkpoint-500")
    (tmp_path / "owner").mkdir()
    assert not is_hub_id("owner/name")
    with pytest.raises(HubError, match="is not an existing path: owner is a folder here"):
        resolve("owner/name")
