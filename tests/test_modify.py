"""Models that were given tokens, tasks and positions: what stays, what is new, and that all of it comes back."""

import copy
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import florence2
from florence2 import Florence2, Task
from florence2.checkpoints.checkpoint import save_checkpoint, save_tokenizer
from florence2.checkpoints.files import write_tasks
from florence2.checkpoints.hub import resolve
from florence2.cli.main import main
from florence2.errors import CheckpointError, ConfigError, Florence2Error, PromptError
from florence2.model.config import Layout
from recipes.nano.scenes import make_scene

DEPTHS = [f"<depth_{i}>" for i in range(100)]
DEPTH = Task("<DEPTH>", "How far away is each thing?")
SCENE = make_scene(8, 2).image
LOCATIONS = [f"<loc_{bin}>" for bin in range(1000)]


@pytest.fixture(scope="module")
def nano() -> Florence2:
    return florence2.load("nano")


@pytest.fixture(scope="module")
def deep(nano: Florence2) -> Florence2:
    """The small model with 100 depth tokens and a task for them; it answers with one of them."""
    f = florence2.add_tasks(florence2.extend_vocabulary(nano, DEPTHS), DEPTH)
    written = f.run("<DEPTH>", SCENE).token_ids[3]
    new = f.processor.tokenizer.token_id("<depth_7>")
    with torch.no_grad():
        table = f.model.language_model.shared.weight
        table[new] = 1.5 * table[written]
    return f


def save(f: Florence2, folder: Path, layout: Layout) -> None:
    """Write every file of a checkpoint."""
    save_checkpoint(f.model, folder, layout)
    save_tokenizer(f.processor.tokenizer, folder, layout, f.model.config)
    write_tasks(folder, f.processor.tasks)
    shutil.copyfile(resolve("nano") / "preprocessor_config.json", folder / "preprocessor_config.json")


@pytest.mark.release
@pytest.mark.parametrize("layout", ["microsoft", "native"])
def test_depth_tokens_and_their_task_come_back_in_a_fresh_process(
    layout: Layout, deep: Florence2, tmp_path: Path
) -> None:
    wanted = deep.run("<DEPTH>", SCENE)
    assert "<depth_7>" in wanted.text and wanted.task == "<DEPTH>"
    save(deep, tmp_path / "depth", layout)
    loaded = florence2.load(tmp_path / "depth")
    assert loaded.processor.tasks["<DEPTH>"] == DEPTH
    assert loaded.run("depth", SCENE).token_ids == wanted.token_ids
    SCENE.save(tmp_path / "scene.png")
    words = ["-m", "florence2", "run", "depth", "<DEPTH>", "scene.png", "--model", "depth", "--json"]
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    # one question, under two names
    assert [(row["task"], row["raw_text"]) for row in rows] == [("<DEPTH>", wanted.raw_text)]


def test_nothing_else_changes(nano: Florence2, deep: Florence2) -> None:
    """The old model, the old tasks' answers, the old ids; and the default path agrees with attention written out."""
    old, new = nano.processor.tokenizer, deep.processor.tokenizer
    assert nano.model.config.text.vocab_size == old.vocab_size == 1631
    assert deep.model.config.text.vocab_size == new.vocab_size == 1731
    assert [new.token_id(token) for token in LOCATIONS] == [old.token_id(token) for token in LOCATIONS]
    assert [new.token_id(token) for token in DEPTHS] == list(range(1631, 1731)) and new.own_tokens == tuple(DEPTHS)
    assert new.encode("a <depth_5> b<loc_5>")[1:-1] == [*old.encode("a ")[1:-1], 1636, *old.encode(" b<loc_5>")[1:-1]]
    assert nano.run("<OD>", SCENE).token_ids == florence2.extend_vocabulary(nano, DEPTHS).run("<OD>", SCENE).token_ids
    assert "<DEPTH>" not in nano.processor.tasks and "<DEPTH>" not in florence2.TASKS
    with pytest.raises(PromptError, match="Unknown task <DEPTH>"):
        nano.run("<DEPTH>", SCENE)
    eager = Florence2(florence2.load("nano", attention="eager").model, nano.processor)
    eager = florence2.add_tasks(florence2.extend_vocabulary(eager, DEPTHS), DEPTH)
    eager.model.load_state_dict(deep.model.state_dict())
    assert eager.run("<DEPTH>", SCENE).token_ids == deep.run("<DEPTH>", SCENE).token_ids


def test_new_rows_are_near_the_mean_and_differ(nano: Florence2) -> None:
    first, again, other = (florence2.extend_vocabulary(nano, DEPTHS, seed=seed) for seed in (0, 0, 1))
    table, old = first.model.language_model.shared.weight, nano.model.language_model.shared.weight
    assert torch.equal(table[:1631], old) and not first.model.final_logits_bias[0, 1631:].any()
    assert torch.equal(first.model.final_logits_bias[:, :1631], nano.model.final_logits_bias)
    assert (table[1631:] - old.mean(0)).abs().max() < 0.2 * old.std()
    assert len(torch.unique(table[1631:].detach(), dim=0)) == 100
    assert torch.equal(table, again.model.language_model.shared.weight)
    assert not torch.equal(table, other.model.language_model.shared.weight)


def test_the_rest_is_shared_and_hooks_stay_apart(nano: Florence2) -> None:
    f = florence2.extend_vocabulary(nano, ["<near>"])
    assert f.model.language_model.decoder.layers[0].fc1.weight is nano.model.language_model.decoder.layers[0].fc1.weight
    f.model.language_model.decoder.layers[0].fc1.register_forward_hook(lambda *_: None)
    assert not nano.model.language_model.decoder.layers[0].fc1._forward_hooks


def test_an_output_projection_of_its_own_grows_too(nano: Florence2) -> None:
    f = copy.deepcopy(nano)
    f.model.untie_head(f.model.output_weight.detach() * 2)
    f.model.untie_answers(f.model.language_model.shared.weight.detach() * 1.01)
    longer = florence2.extend_vocabulary(f, ["<near>"])
    assert longer.model.output_weight.shape[0] == 1632
    assert len(longer.model.language_model.decoder.embed_tokens.weight) == 1632
    assert longer.run("<OD>", SCENE).token_ids == f.run("<OD>", SCENE).token_ids


def test_the_spare_rows_of_the_native_layout_are_used(nano: Florence2, tmp_path: Path) -> None:
    """A padded embedding with an <image> row: the new ids follow the text's, and <image> follows them."""
    save(nano, tmp_path / "padded", "native")
    f = florence2.load(tmp_path / "padded")
    assert (f.model.config.text.vocab_size, f.model.config.image_token_id) == (1664, 1631)
    longer = florence2.extend_vocabulary(f, ["<near>", "<far>"])
    assert longer.model.config.text.vocab_size == longer.processor.tokenizer.vocab_size == 1633
    save(longer, tmp_path / "longer", "native")
    again = florence2.load(tmp_path / "longer")
    assert again.processor.tokenizer.token_id("<far>") == 1632 and again.model.config.image_token_id == 1633
    table, new = (g.model.language_model.shared.weight for g in (again, longer))
    assert torch.equal(table[:1633], new)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        ([], "give a list of names"),
        (None, "give a list of names"),
        ([5], "give a list of names"),
        (["<od>"], "'<od>' exists already"),
        (["<loc_7>"], "'<loc_7>' has a meaning of its own"),
        (["<loc_1000>", "<image>"], "'<loc_1000>' has a meaning.*'<image>' has a meaning"),
        (["<near>", "<near>"], "'<near>' occurs 2 times"),
        (["near"], "must be a name in angle brackets"),
        (["<a b>"], "without white space"),
        (["<<a>>"], "must be a name in angle brackets"),
        ([""], "must be a name in angle brackets"),
        (["<a\udcff>"], "must be a name in angle brackets"),
        (["<é>"], "would not be read back"),
    ],
)
def test_unusable_tokens_get_a_sentence(tokens: Any, words: str, nano: Florence2) -> None:
    with pytest.raises(PromptError, match=words):
        florence2.extend_vocabulary(nano, tokens)


def test_a_seed_is_a_whole_number(nano: Florence2) -> None:
    with pytest.raises(ConfigError, match="seed is 0.5; it must be a whole number"):
        florence2.extend_vocabulary(nano, ["<near>"], seed=0.5)  # type: ignore[arg-type]


def test_a_part_of_a_model_has_positions_but_no_vocabulary() -> None:
    f = florence2.load("nano", parts="vision")
    with pytest.raises(Florence2Error, match='load it with parts="all"'):
        florence2.extend_vocabulary(f, ["<near>"])
    larger = florence2.resize_positions(f, 28, image_size=(448, 384))
    assert larger.encode_image(SCENE).features.shape[1] == 1 + 24 * 28


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        (Task("<OD>", "Something else."), "Task <OD> already exists with the sentence 'Locate the objects"),
        ([DEPTH, replace(DEPTH, sentence="How far?")], "Task <DEPTH> already exists"),
        (Task("depth", "How far?"), "in angle brackets, such as"),
        (Task("<DEPTH>", "How far is {input}?"), "takes nothing, so its sentence must not contain"),
        (["<DEPTH>"], "'<DEPTH>' is not a Task"),
    ],
)
def test_unusable_tasks_get_a_sentence(tasks: Any, words: str, nano: Florence2) -> None:
    with pytest.raises(PromptError, match=words):
        florence2.add_tasks(nano, tasks)


def test_a_task_is_added_once(nano: Florence2) -> None:
    f = florence2.add_tasks(florence2.add_tasks(nano, DEPTH), [DEPTH, Task("<COUNT>", "How many things?")])
    assert [task.token for task in f.processor.tasks.own] == ["<DEPTH>", "<COUNT>"]
    assert f.model is nano.model


# ---- on the command line ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deep_folder(deep: Florence2, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deep") / "checkpoint"
    save(deep, folder, "microsoft")
    SCENE.save(folder.parent / "scene.png")
    row = {"image": "scene.png", "prefix": "<DEPTH>", "suffix": "box<depth_7>"}
    (folder.parent / "data.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.mark.parametrize("command", [["run"], ["inspect", "--json"]])
def test_a_word_that_is_not_a_task_of_the_model_is_refused(
    command: list[str], deep_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(deep_folder.parent / "scene.png")
    assert main([*command, "depht", image, "--model", str(deep_folder)]) == 2
    assert "Unknown task 'depht'; did you mean depth?" in capsys.readouterr().err
    assert main([*command, "depth", image, "--model", "nano"]) == 2
    assert "Unknown task 'depth'. Known tasks: <OCR>, " in capsys.readouterr().err
    assert main([*command, "<DEPTH>", image, "--model", "nano"]) == 2
    assert "Unknown task <DEPTH>" in capsys.readouterr().err


def test_tasks_of_the_model_mix_with_others(deep_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = str(deep_folder.parent / "scene.png")
    assert main(["run", "od", "depth", image, "--model", str(deep_folder), "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["task"] for row in rows] == ["<OD>", "<DEPTH>"]


@pytest.mark.release
def test_train_and_evaluate_know_the_tasks(
    deep_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(deep_folder.parent / "data.jsonl")
    common = [data, "--model", str(deep_folder)]
    assert main(["evaluate", *common, "--json"]) == 0
    (metrics,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert metrics["task"] == "<DEPTH>" and metrics["count"] == 1
    out = tmp_path / "run"
    assert main(["train", *common, "--out", str(out), "--steps", "2", "--batch", "1", "--workers", "0"]) == 0
    capsys.readouterr()
    trained = florence2.load(out / "checkpoint")
    assert trained.processor.tasks.own == (DEPTH,) and trained.processor.tokenizer.own_tokens == tuple(DEPTHS)


# ---- positions -------------------------------------------------------------------------------------------------------


def table_of(f: Florence2) -> torch.Tensor:
    position = f.model.multi_modal_projector.image_position_embed
    return torch.stack([position.row_embeddings.weight, position.column_embeddings.weight]).detach()


def test_a_larger_table_lets_larger_images_in(nano: Florence2) -> None:
    with pytest.raises(CheckpointError, match="448 x 384 pixels.* give a grid of 24 x 28 .* knows 1 x 1 to 24 x 24"):
        florence2.resize_positions(nano, 24, image_size=(448, 384))
    f = florence2.resize_positions(nano, 28, image_size=(448, 384))
    assert f.encode_image(SCENE).features.shape[1] == 1 + 24 * 28
    assert (
        f.model.config.vision.max_position_embeddings == 28 and nano.model.config.vision.max_position_embeddings == 24
    )
    assert f.run("<OD>", SCENE, max_new_tokens=3).image_size == SCENE.size
    assert f.model.vision_tower.convs[0].conv.weight is nano.model.vision_tower.convs[0].conv.weight


def test_tables_are_stretched_with_aligned_corners(nano: Florence2) -> None:
    old = table_of(nano)
    assert torch.equal(table_of(florence2.resize_positions(nano, 24)), old)
    longer = table_of(florence2.resize_positions(nano, 47))
    torch.testing.assert_close(longer[:, ::2], old)
    torch.testing.assert_close(longer[:, 1::2], (old[:, 1:] + old[:, :-1]) / 2)
    twelve = table_of(florence2.resize_positions(nano, 23, rows=12))
    torch.testing.assert_close(twelve[:, ::2], old[:, :12])


def test_a_resized_model_comes_back(nano: Florence2, tmp_path: Path) -> None:
    f = florence2.resize_positions(nano, 28, rows=12)
    save(f, tmp_path / "resized", "microsoft")
    loaded = florence2.load(tmp_path / "resized")
    assert torch.equal(table_of(loaded), table_of(f))
    assert loaded.run("<OD>", SCENE).token_ids == f.run("<OD>", SCENE).token_ids


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"size": 0}, "size is 0; it must be a whole number of 1 to"),
        ({"size": 2.5}, "size is 2.5"),
        ({"size": 30, "rows": 25}, "rows is 25; it must be a whole number of 1 to 24"),
        ({"size": 30, "image_size": (0, 5)}, "width of image_size is 0; it must be a whole number of 1 to"),
        ({"size": 30, "image_size": (5, 0)}, "height of image_size is 0; it must be a whole number of 1 to"),
        ({"size": 30, "image_size": 384}, r"image_size is 384; it must be \(width, height\)"),
    ],
)
def test_sizes_out_of_range_get_a_sentence(values: dict[str, Any], words: str, nano: Florence2) -> None:
    with pytest.raises(ConfigError, match=words):
        florence2.resize_positions(nano, **values)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size": {"height": 1664, "width": 1664}}, "Images of 1664 x 1664 pixels.* give a grid of 104 x 104"),
        ({"size": {"height": 384, "width": 384}}, "states an image_seq_length of 145, but images of 384 x 384 .* 577"),
        ({"image_seq_length": 577}, "states an image_seq_length of 577, .* become 145 tokens"),
    ],
)
def test_image_settings_that_no_image_can_pass_are_found_at_load(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    shutil.copytree(resolve("nano"), tmp_path / "nano")
    path = tmp_path / "nano" / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=words):
        florence2.load(tmp_path / "nano")


def test_image_tokens_leave_room_for_a_prompt(nano: Florence2) -> None:
    with pytest.raises(CheckpointError, match="become 1025 tokens, which leave no room for a prompt in the 1024"):
        florence2.resize_positions(nano, 32, image_size=(512, 512))


def test_a_changed_model_is_not_calibrated(nano: Florence2) -> None:
    """Its confidences are raw; tasks alone change no answer."""
    assert nano.processor.calibration.tables
    for f in (florence2.extend_vocabulary(nano, ["<near>"]), florence2.resize_positions(nano, 20)):
        assert not f.processor.calibration.tables
    assert florence2.add_tasks(nano, DEPTH).processor.calibration == nano.processor.calibration
