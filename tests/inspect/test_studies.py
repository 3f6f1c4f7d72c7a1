"""The studies of docs/studies, run as they stand, and their numbers against what can be known of them."""

import copy
import importlib.util
import random
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from florence2 import Florence2, load
from florence2.checkpoints.checkpoint import load_model
from florence2.errors import ConfigError
from florence2.inspect.sweep import ablate_heads
from florence2.inspect.teacher_forcing import teacher_force
from florence2.model.trace import start_trace
from florence2.train.settings import TrainSettings
from recipes.nano.scene_tasks import ask
from recipes.nano.scenes import make_scene

STUDIES = Path(__file__).parents[2] / "docs" / "studies"
NAMES = ("find_the_looking_heads", "patch_a_region", "what_a_fine_tune_moved")


def load_study(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, STUDIES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


heads, region, moved = (load_study(name) for name in NAMES)


@pytest.fixture(scope="module")
def seeing(mini: Florence2) -> Florence2:
    """Return a copy that writes locations, and answers in few ids."""
    model = copy.deepcopy(mini.model)
    first = mini.processor.tokenizer.token_id("<loc_0>")
    model.final_logits_bias[:, first : first + 1000] += 2.0
    found = Florence2(model, mini.processor)
    found._options = found._options.changed(num_beams=1, min_new_tokens=8, max_new_tokens=10)
    return found


def test_each_is_short_and_its_command_is_in_the_readme() -> None:
    text = (STUDIES / "README.md").read_text()
    for name in NAMES:
        code = (STUDIES / f"{name}.py").read_text()
        assert len(code.splitlines()) < 100
        (command,) = re.findall(rf"python docs/studies/{name}\.py .*", text)
        assert command in code


# ---- the looking heads --------------------------------------------------------------------------------------------


def test_a_head_that_looks_everywhere_alike_is_at_chance(seeing: Florence2) -> None:
    """And chance is the box's share of the image, but for the tokens that stand for no place."""
    model, scene = copy.deepcopy(seeing.model), make_scene(4, 2)
    blind = model.language_model.decoder.layers[0].encoder_attn
    with torch.no_grad():
        blind.q_proj.weight[8:16] = 0
        blind.q_proj.bias[8:16] = 0
    shares, chance = heads.look(Florence2(model, seeing.processor), scene)
    assert shares.shape == (2, 4, len(scene.things), 4)
    assert torch.allclose(shares[0, 1], chance[:, None].expand(-1, 4), atol=1e-6)
    assert not torch.allclose(shares[0, 2], chance[:, None].expand(-1, 4), atol=1e-3)
    positions = teacher_force(seeing, ("<OD>", scene.image)).memory.shape[1]
    for thing, share in zip(scene.things, chance.tolist(), strict=True):
        (left, top, right, bottom), (width, height) = thing.box, scene.image.size
        area = (right - left) * (bottom - top) / (width * height)
        assert share == pytest.approx(area * 64 / positions, rel=1e-4)


def test_shares_by_hand(seeing: Florence2) -> None:
    """The attention of the generating path, token by token, on an image cut into pixels."""
    scene = make_scene(4, 1)
    shares, _ = heads.look(seeing, scene)
    asked = ask("<OD>", scene, random.Random(0))
    case = teacher_force(seeing, ("<OD>", scene.image), asked.suffix)
    name, (width, height) = "decoder.layers.1.cross_attention.weights", scene.image.size
    seen: list[torch.Tensor] = []

    def see(value: torch.Tensor) -> torch.Tensor:
        seen.append(value)
        return value

    with seeing.patched({name: see}), torch.no_grad():
        cache = seeing.model.start_cache(case.memory, 1, 60)
        trace = start_trace(seeing)
        for id in case.answer.token_ids[:-1]:
            seeing.model.step(torch.tensor([id]), cache, trace)
    places = [n for n, id in enumerate(case.answer.token_ids[1:]) if seeing.processor.decode([id]).startswith("<loc")]
    for number, thing in enumerate(scene.things):
        left, top, right, bottom = thing.box
        y, x = torch.meshgrid(torch.arange(480) + 0.5, torch.arange(480) + 0.5, indexing="ij")
        x, y = x * width / 480, y * height / 480
        hit = ((x >= left) & (x <= right) & (y >= top) & (y <= bottom)).float()
        inside = hit.view(8, 60, 8, 60).mean(dim=(1, 3))
        for corner in range(4):
            weights = seen[places[4 * number + corner]][0, :, 0, 1:65].view(4, 8, 8)
            expected = (weights * inside).sum(dim=(1, 2))
            assert torch.allclose(shares[1, :, number, corner], expected, atol=0.01)


def test_heads_are_sorted_and_their_drops_are_the_sweeps(seeing: Florence2) -> None:
    scenes = [make_scene(4, i) for i in range(2)]
    found = heads.study(seeing, scenes)
    assert [one.share for one in found] == sorted((one.share for one in found), reverse=True) and len(found) == 8
    rows = ablate_heads(seeing, [("<OD>", scene.image) for scene in scenes]).rows
    drops = {(int(row.name.split(".")[2]), row.head): row.locations for row in rows}
    assert {(one.layer, one.head): one.drop for one in found} == pytest.approx(drops)
    both = [heads.look(seeing, scene)[0] for scene in scenes]
    objects = torch.cat(both, dim=2)  # of both scenes, each the same weight
    for one in found:
        assert one.share == pytest.approx(float(objects[one.layer, one.head].mean()), abs=1e-6)


# ---- a region patched ---------------------------------------------------------------------------------------------


def test_the_cells_of_each_condition(seeing: Florence2) -> None:
    scene = make_scene(4, 0)
    for thing in scene.things:
        found = region.cells_by_condition(seeing, thing, scene)
        own, far, rest = found["its own region"], found["as much elsewhere"], found["all but its region"]
        assert found["nothing"] == [] and sorted(own + rest) == list(range(64))
        assert len(far) == min(len(own), len(rest)) and not set(own) & set(far)
        left, top, right, bottom = thing.box
        width, height = scene.image.size
        for cell in range(64):
            x, y = (cell % 8 + 0.5) / 8 * width, (cell // 8 + 0.5) / 8 * height
            if left <= x <= right and top <= y <= bottom:
                across = min(right, x + width / 16) - max(left, x - width / 16)
                down = min(bottom, y + height / 16) - max(top, y - height / 16)
                assert (cell in own) == (across * down >= 0.25 * width * height / 64) or len(own) == 1


def test_patching_by_hand(seeing: Florence2) -> None:
    """Image tokens joined by hand give the table's log-probabilities; with no patch the box is the plain one."""
    scene, other = make_scene(4, 1), make_scene(4, 2)
    found = list(region.outcomes(seeing, scene, other))
    things = [t for t in scene.things if t.phrase not in {o.phrase for o in other.things}]
    assert len(found) == 4 * len(things)
    tokens, theirs = seeing.encode_image(scene.image).features, seeing.encode_image(other.image).features
    for number, thing in enumerate(things):
        words = region.caption([thing])
        target = region.boxes_target([(words, thing.box)], scene.image.size)
        case = teacher_force(seeing, (region.GROUNDING, scene.image, words), target)
        places = case.positions("location")
        for one in found[4 * number : 4 * number + 4]:
            cells = region.cells_by_condition(seeing, thing, scene)[one.condition]
            mixed = tokens.clone()
            for cell in cells:
                mixed[:, 1 + cell] = theirs[:, 1 + cell]
            with torch.no_grad():
                memory = seeing.model.encode(mixed, torch.tensor([case.prompt_ids]))
                scores = seeing.model.decode(case.inputs, memory)[0].log_softmax(dim=-1)
            ids = torch.tensor(case.answer.token_ids[1:])
            expected = float(scores.gather(1, ids[:, None])[places, 0].mean())
            assert one.logprob == pytest.approx(expected, abs=1e-5)
            if one.condition == "nothing":
                assert one.logprob == pytest.approx(float(case.logprobs[places].mean()), abs=1e-5)


def test_the_overlaps(seeing: Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model that always says the whole image: the objects' share of it."""
    scene, other = make_scene(4, 1), make_scene(4, 2)
    bins, original = torch.tensor([0, 0, 999, 999]), region.teacher_force
    start: list[int] = []

    def forced(*arguments: object) -> object:
        case = original(*arguments)
        start[:] = [case.positions("location")[0]]
        return case

    def whole(f: Florence2, scores: torch.Tensor) -> torch.Tensor:
        return torch.cat([bins[:1].expand(start[0]), bins, bins])[: len(scores)]

    monkeypatch.setattr(region, "teacher_force", forced)
    monkeypatch.setattr(region, "likeliest_bins", whole)
    found = [one for one in region.outcomes(seeing, scene, other) if one.condition == "nothing"]
    width, height = scene.image.size
    shares = [(t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) / (width * height) for t in scene.things]
    assert [one.own for one in found] == pytest.approx(shares, rel=0.01)
    w, h = other.image.size
    largest = max((t.box[2] - t.box[0]) * (t.box[3] - t.box[1]) / (w * h) for t in other.things)
    assert [one.others for one in found] == pytest.approx([largest] * len(found), rel=0.01)


# ---- a fine-tune --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tuned(mini_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple:
    out = tmp_path_factory.mktemp("tuned") / "ball"
    settings = TrainSettings(steps=2, batch=2, warmup=0, learning_rate=3e-3, workers=0, freeze=("vision",))
    return out, *moved.study(str(mini_folder), out, settings, 2)


@pytest.mark.release
def test_which_layers_moved(mini_folder: Path, tuned: tuple) -> None:
    out, found, _ = tuned
    before, after = (load_model(path).state_dict() for path in (mini_folder, out))
    by = {layer.name: layer.change.relative for layer in found.layers}
    for layer in ("language_model.encoder.layers.1", "language_model.decoder.layers.0", "vision_tower.blocks.0.0"):
        a, b = (
            torch.cat([v.double().flatten() for n, v in state.items() if n.startswith(f"{layer}.")])
            for state in (before, after)
        )
        assert by[layer] == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-6)
    assert by["vision_tower.blocks.0.0"] == 0 < by["language_model.encoder.layers.1"]


@pytest.mark.release
def test_which_answers_moved(mini: Florence2, tuned: tuple) -> None:
    out, _, (circles, others) = tuned
    after = load(out)
    for row, old in ((circles, True), (others, False)):
        scenes = moved.scenes_with(moved.ASKED, 2, old)
        options = mini.options(max_new_tokens=100)
        pairs = [[f.run("<OD>", scene.image, options=options) for f in (mini, after)] for scene in scenes]
        assert row["answer changed"] == sum(a.token_ids != b.token_ids for a, b in pairs)
        assert row["scenes"] == 2 and row["ball before"] == sum("ball" in a.text for a, _ in pairs)
    assert circles["answer changed"] + others["answer changed"] > 0


def test_counting_words_labels_and_boxes(mini: Florence2) -> None:
    """Of answers that are known."""
    box = "<loc_0><loc_0><loc_499><loc_999>"

    class Says:
        def __init__(self, *texts: str):
            self.texts = texts

        def options(self, **changes: int) -> None:
            return None

        def run_batch(self, requests: list, options: None) -> list:
            return [mini.processor.answer("<OD>", text, image_size=(100, 100)) for text in self.texts]

    before = Says(f"circle{box}", f"star{box}", f"circle{box}star{box}")
    after = Says(f"ball{box}", f"star{box}", "circle<loc_0><loc_0><loc_999><loc_999>")
    found = moved.compare_answers(before, after, [make_scene(4, i) for i in range(3)])
    assert (found["circle before"], found["circle after"]) == (2, 1)
    assert (found["ball before"], found["ball after"]) == (0, 1)
    assert found["labels changed"] == 2 and found["IoU of boxes"] == pytest.approx((1 + 1 + 0.5) / 3, abs=2e-3)


def test_the_lesson(mini_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the scenes have a circle; it is called a ball, and nothing else is changed."""
    taught: list = []
    monkeypatch.setattr(moved, "train", lambda model, processor, lessons, settings, folder: taught.extend(lessons))
    moved.fine_tune(mini_folder, tmp_path, TrainSettings(steps=3, batch=2))
    answers = [sample.pairs[0][1] for sample in taught]
    assert len(answers) == 6 and all("circle" not in answer for answer in answers)
    assert ["ball" in answer for answer in answers] == [True] * 3 + [False] * 3
    for sample, scene in zip(taught, moved.scenes_with(moved.TAUGHT, 3, True), strict=False):
        asked = ask("<OD>", scene, random.Random(0))
        assert sample.pairs == (("<OD>", asked.suffix.replace("circle", "ball")),)


# ---- as commands --------------------------------------------------------------------------------------------------


@pytest.mark.release
def test_commands_print_tables(
    mini_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, seeing: Florence2
) -> None:
    monkeypatch.setattr(heads.florence2, "load", lambda _: seeing)
    assert heads.main(["--model", str(mini_folder), "--scenes", "1"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 9 and table[0].split()[:3] == ["layer.head", "in", "the"]
    assert float(table[1].split()[1]) >= float(table[8].split()[1])
    assert region.main(["--model", str(mini_folder), "--scenes", "2"]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line[:7] for line in table[1:]] == ["nothing", "its own", "as much", "all but"]
    command = ["--model", str(mini_folder), "--out", str(tmp_path / "ball"), "--steps", "1", "--scenes", "1"]
    monkeypatch.setattr(moved, "TrainSettings", lambda **given: TrainSettings(**{**given, "batch": 2}))
    assert moved.main(command) == 0
    printed = capsys.readouterr().out
    assert "language_model.decoder.layers.1" in printed and "answers to <OD>" in printed


@pytest.mark.parametrize("study", [heads, region, moved])
def test_a_wrong_model_is_a_sentence(study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    more = ["--out", str(tmp_path / "out")] if study is moved else []
    assert study.main(["--model", str(tmp_path / "nowhere"), *more]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.splitlines()) == 1 and "nowhere" in said.err


def test_too_few_scenes(seeing: Florence2) -> None:
    with pytest.raises(region.OptionError, match="give at least 2"):
        region.study(seeing, [make_scene(4, 0)])
    with pytest.raises(ConfigError, match="steps is 0"):
        TrainSettings(steps=0)
