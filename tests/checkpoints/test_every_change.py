"""Every change of a model comes back from disk: the same answer in a new process, by Python and by the command line."""

import copy
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import florence2
from florence2 import Florence2
from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.tensors import find_weights
from florence2.cli.main import main
from florence2.errors import CheckpointError
from florence2.model.config import change_config
from recipes.nano.write_scenes import write_scenes
from tests.checkpoints.prepared import PREPARE, answer, insert_adapters

ROOT = Path(__file__).parents[2]


def enlarge_positions(model: Any) -> None:
    """Interpolate the position table of the vision tower to 30 rows and columns."""
    table = model.multi_modal_projector.image_position_embed
    for part in (table.row_embeddings, table.column_embeddings):
        wider = F.interpolate(part.weight.detach().T[None], 30, mode="linear", align_corners=True)[0].T
        part.weight, part.num_embeddings = nn.Parameter(wider.contiguous()), 30
    model.config = change_config(model.config, {"vision.max_position_embeddings": 30})


CHANGES: dict[str, Mapping[str, Any] | Callable[[Any], None]] = {
    "activation": {"text.activation_function": "silu"},
    "native activation": {"vision.activation_function": "relu", "text.activation_function": "gelu_new"},
    "window": {"vision.window_size": 8},
    "positions": enlarge_positions,
    **PREPARE,
}


@pytest.fixture(scope="module")
def changed(
    mini: Florence2, mini_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, list[Any]]]:
    """Return a folder of changed checkpoints, with the answers that they gave before they were saved."""
    root, answers = tmp_path_factory.mktemp("changed"), {}
    for name, change in CHANGES.items():
        torch.manual_seed(3)
        if isinstance(change, Mapping):
            f = florence2.load(mini_folder, changes=change)
        else:
            f = Florence2(copy.deepcopy(mini.model), mini.processor)
            change(f.model)
            f.model.eval()
        native = name.startswith("native")
        if native:  # which has no place for it
            f.model.final_logits_bias.zero_()
        answers[name] = answer(f)
        f.save(root / name, "native" if native else "microsoft", prepare=PREPARE.get(name))
    return root, answers


@pytest.fixture(scope="module")
def fresh(changed: tuple[Path, dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Return the answers of a new process."""
    command = [sys.executable, "-m", "tests.checkpoints.prepared", str(changed[0])]
    answers: dict[str, list[Any]] = json.loads(subprocess.check_output(command, cwd=ROOT, text=True))
    return answers


@pytest.mark.release
@pytest.mark.parametrize("name", CHANGES)
def test_a_new_process_gives_the_same_answer(
    mini: Florence2, changed: tuple[Path, dict[str, list[Any]]], fresh: dict[str, list[Any]], name: str
) -> None:
    ids, logprobs = changed[1][name]
    assert fresh[name][0] == ids and fresh[name][1] == pytest.approx(logprobs, abs=1e-4)
    assert logprobs != pytest.approx(answer(mini)[1], abs=1e-3) or name == "positions"


@pytest.mark.parametrize("name", CHANGES)
def test_what_was_loaded_is_saved_again_without_more_words(
    changed: tuple[Path, dict[str, list[Any]]], tmp_path: Path, name: str
) -> None:
    root = changed[0]
    f = florence2.load(root / name, prepare=PREPARE.get(name))
    assert isinstance(f.model.config, florence2.Florence2Config)
    f.save(tmp_path / "again", f.model.config.layout)
    first, second = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (root / name, tmp_path / "again"))
    assert first == second


@pytest.mark.parametrize("name", PREPARE)
def test_without_its_function_it_is_refused(changed: tuple[Path, dict[str, list[Any]]], name: str) -> None:
    """Also where all names and shapes fit: the old model must not answer in the place of the changed one."""
    function = f"tests.checkpoints.prepared:{PREPARE[name].__name__}"
    with pytest.raises(CheckpointError, match=f"saved with the prepare function {function}; load it with that"):
        florence2.load(changed[0] / name)


def test_what_the_model_lacks_is_named_with_the_remedy(
    changed: tuple[Path, dict[str, list[Any]]], mini_folder: Path
) -> None:
    adapter = "language_model.model.decoder.layers.0.adapter.down.weight"
    with pytest.raises(CheckpointError, match=f"(?s)unexpected: {adapter} .*the function that adds them as prepare="):
        florence2.load(changed[0] / "adapter")
    with pytest.raises(CheckpointError, match=f"(?s)missing: {adapter} .*which tensors the file must hold"):
        florence2.load(mini_folder, prepare=insert_adapters)


@pytest.mark.parametrize(
    ("name", "stored"),
    [
        ("adapter", "extra.vision_tower.blocks.1.0.spatial_block.adapter.up.bias"),
        ("adapter", "language_model.model.decoder.layers.1.adapter.up.bias"),
        ("native adapter", "model.vision_tower.blocks.1.0.spatial_block.adapter.up.bias"),
        ("tower", "extra.vision_tower.norm.num_batches_tracked"),
        ("native tower", "model.vision_tower.norm.num_batches_tracked"),
        ("second head", "extra.second.weight"),
    ],
)
def test_the_names_in_the_files(changed: tuple[Path, dict[str, list[Any]]], name: str, stored: str) -> None:
    assert stored in find_weights(changed[0] / name).read_headers(whole_numbers=True)


def test_buffers_that_are_not_stored(changed: tuple[Path, dict[str, list[Any]]]) -> None:
    f = florence2.load(changed[0] / "tower", dtype="bfloat16", prepare=PREPARE["tower"])
    tower: Any = f.model.vision_tower
    assert torch.equal(tower.ramp.flatten(), torch.linspace(0.0, 3.0, 32).bfloat16())
    assert tower.norm.num_batches_tracked.dtype == torch.int64 and tower.norm.running_var.dtype == torch.bfloat16


def test_a_shared_layer_is_one_again(changed: tuple[Path, dict[str, list[Any]]]) -> None:
    model = florence2.load(changed[0] / "repeated layer", prepare=PREPARE["repeated layer"]).model
    layers = model.language_model.decoder.layers
    assert len(layers) == 3 and layers[1] is layers[2]
    names = find_weights(changed[0] / "repeated layer").read_headers()
    assert not any("layers.2." in name for name in names if "decoder" in name)  # stored once


@pytest.mark.parametrize("parts", ["vision", "encoder"])
def test_parts_of_a_changed_model(changed: tuple[Path, dict[str, list[Any]]], parts: Any) -> None:
    whole = florence2.load(changed[0] / "adapter", prepare=insert_adapters).model
    part = florence2.load(changed[0] / "adapter", prepare=insert_adapters, parts=parts).model
    pixels = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(part.encode_image(pixels), whole.encode_image(pixels))


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adapter", "tower", "pruned heads"])
def test_the_command_line_gives_the_same_answer(
    changed: tuple[Path, dict[str, list[Any]]], picture_file: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    folder, function = changed[0] / name, PREPARE[name]
    arguments = ["--model", str(folder), "--beams", "1", "--max-new-tokens", "8", "--json"]
    prepare = ["--prepare", f"{function.__module__}:{function.__name__}"]
    assert main(["run", "<OD>", str(picture_file), *arguments, *prepare]) == 0
    row = json.loads(capsys.readouterr().out)
    f = florence2.load(folder, prepare=function)
    expected = f.run("<OD>", picture_file, num_beams=1, max_new_tokens=8)
    assert row["raw_text"] == expected.raw_text
    assert main(["run", "<OD>", str(picture_file), *arguments]) == 2
    assert "does not fit its config.json" in capsys.readouterr().err


def test_a_setting_changed_on_the_command_line(
    mini_folder: Path, changed: tuple[Path, dict[str, list[Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = ["--change", "text.activation_function=silu"]
    assert main(["convert", str(mini_folder), str(tmp_path / "c"), *change]) == 0
    assert answer(florence2.load(tmp_path / "c")) == changed[1]["activation"]
    assert main(["convert", str(mini_folder), str(tmp_path / "d"), "--change", "vision.window_size=eight"]) == 2
    assert "vision.window_size must be int, not 'eight'" in capsys.readouterr().err


def test_convert_keeps_what_was_added(changed: tuple[Path, dict[str, list[Any]]], tmp_path: Path) -> None:
    prepare = ["--prepare", "tests.checkpoints.prepared:insert_adapters"]
    assert main(["convert", str(changed[0] / "native adapter"), str(tmp_path / "c"), *prepare]) == 0
    f = florence2.load(tmp_path / "c", prepare=insert_adapters)
    ids, logprobs = changed[1]["native adapter"]
    assert answer(f)[0] == ids and answer(f)[1] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.release
def test_train_evaluate_and_inspect_with_a_function(
    changed: tuple[Path, dict[str, list[Any]]], picture_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_scenes(tmp_path / "data", 5, 2, ["<OD>", "<CAPTION>"])
    folder, run = changed[0] / "adapter", tmp_path / "run"
    prepare = ["--prepare", "tests.checkpoints.prepared:insert_adapters", "--device", "cpu"]
    schedule = "--steps 1 --batch 2 --workers 0 --learning-rate 1e-2 --warmup 0".split()
    words = [str(tmp_path / "data"), "--model", str(folder), "--out", str(run), *schedule]
    assert main(["train", *words, *prepare]) == 0
    name = "language_model.decoder.layers.0.adapter.up.weight"
    before, after = (load_model(path, prepare=insert_adapters).state_dict() for path in (folder, run / "checkpoint"))
    assert not torch.equal(before[name], after[name])
    assert json.loads((run / "settings.json").read_text())["prepare"] == prepare[1]
    short = ["--model", str(run / "checkpoint"), "--beams", "1", "--max-new-tokens", "3", *prepare]
    assert main(["evaluate", str(tmp_path / "data"), "--limit", "1", *short]) == 0
    assert main(["inspect", "<OD>", str(picture_file), "--json", "--no-saliency", *short]) == 0
    assert main(["train", *words, "--device", "cpu"]) == 2
    assert "saved with the prepare function" in capsys.readouterr().err


@pytest.mark.release
def test_a_module_in_the_current_folder_in_a_new_process(
    changed: tuple[Path, dict[str, list[Any]]], picture_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "my_changes.py").write_text("from tests.checkpoints.prepared import insert_adapters as insert\n")
    script = "import sys; sys.path[:] = [p for p in sys.path if p]; from florence2.cli.main import main; main()"
    words = ["run", "<OD>", str(picture_file), "--model", str(changed[0] / "adapter"), "--prepare", "my_changes:insert"]
    words += ["--beams", "1", "--max-new-tokens", "4"]
    done = subprocess.run(
        [sys.executable, "-c", script, *words],
        cwd=tmp_path,
        text=True,
        capture_output=True,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0 and done.stderr.count("\n") == 1 and "cut off" in done.stderr, done.stderr
