"""Sweeps, against models whose weights are really gone, and against what was built in."""

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from florence2 import Answer, Florence2, load
from florence2.errors import OptionError
from florence2.inspect import sweep as sweep_module
from florence2.inspect.ablation import Ablation, Sweep
from florence2.inspect.regions import mean_iou
from florence2.inspect.sweep import ablate_blocks, ablate_heads, read_rows
from florence2.inspect.teacher_forcing import ForcedAnswer, answer_logprobs, answer_scores, teacher_force
from florence2.pipeline import Request
from florence2.tracing.patches import zero_heads
from recipes.nano.scene_tasks import caption
from recipes.nano.scenes import make_scene

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"
CROSS = "decoder.layers.{}.cross_attention.heads"


@pytest.fixture(scope="module")
def requests(mini: Florence2, images: list[Image.Image]) -> list[Request]:
    return [("<OD>", images[0]), ("<CAPTION_TO_PHRASE_GROUNDING>", images[1], "a red circle")]


@pytest.fixture(scope="module")
def cases(short: Florence2, requests: list[Request]) -> list[ForcedAnswer]:
    return [teacher_force(short, request) for request in requests]


@pytest.fixture(scope="module")
def short(mini: Florence2) -> Florence2:
    """Asked greedily, with answers of 8 to 10 ids, in which locations are likely."""
    settings = {"num_beams": 1, "min_new_tokens": 8, "max_new_tokens": 10, "forced_bos_token_id": 0}
    model = copy.deepcopy(mini.model)
    first = mini.processor.tokenizer.token_id("<loc_0>")
    model.final_logits_bias[:, first : first + 1000] += 1.0
    found = Florence2(model, mini.processor)
    found._options = found._options.changed(**settings)
    return found


def without_head(f: Florence2, attention: str, head: int) -> Florence2:
    """Return a copy of the model whose output projection takes nothing from a head: no patch, no trace."""
    model = copy.deepcopy(f.model)
    projection = model.get_submodule(attention).out_proj
    d = projection.weight.shape[1] // model.get_submodule(attention).heads
    with torch.no_grad():
        projection.weight[:, head * d : (head + 1) * d] = 0
    return Florence2(model, f.processor)


def forced(f: Florence2, case: ForcedAnswer) -> Tensor:
    """Return the log-probabilities of a case's answer by another model."""
    return teacher_force(f, case.request, case.answer).logprobs


def mean_drop(cases: list[ForcedAnswer], ablated: list[Tensor], kind: str | None = None) -> float:
    rows = [(c.logprobs - a)[c.positions(kind)] for c, a in zip(cases, ablated, strict=True)]
    return float(torch.cat(rows).mean())


@pytest.mark.parametrize(
    ("kind", "path", "heads"),
    [
        ("cross_attention", "language_model.decoder.layers.1.encoder_attn", 4),
        ("self_attention", "language_model.decoder.layers.1.self_attn", 4),
        ("encoder", "language_model.encoder.layers.1.self_attn", 2),
    ],
)
def test_each_head_against_a_model_without_it(
    short: Florence2, requests: list[Request], cases: list[ForcedAnswer], kind: str, path: str, heads: int
) -> None:
    found = ablate_heads(short, requests, kind=kind, layers=[1])
    assert [row.head for row in found.rows] == list(range(heads))
    for row in found.rows:
        ablated = [forced(without_head(short, path, row.head), case) for case in cases]
        assert row.drop == pytest.approx(mean_drop(cases, ablated), abs=1e-5)
        assert row.locations == pytest.approx(mean_drop(cases, ablated, "location"), abs=1e-5)
        assert row.words == pytest.approx(mean_drop(cases, ablated, "word"), abs=1e-5)
        assert row.by_request[1] == pytest.approx(mean_drop(cases[1:], ablated[1:]), abs=1e-5)
    assert max(abs(row.drop) for row in found.rows) > 0.01
    everything = torch.cat([case.logprobs[case.positions()] for case in cases])
    assert found.logprob == pytest.approx(float(everything.mean()), abs=1e-5)
    assert found.answers == tuple(case.answer.raw_text for case in cases)


def test_a_patch_changes_the_answer_as_the_sweep_predicts(
    short: Florence2, requests: list[Request], cases: list[ForcedAnswer]
) -> None:
    """What f.patched and teacher forcing measure is the sweep's number, and so is what the patched model answers."""
    found = ablate_heads(short, requests, layers=[0], generate=True)
    for row in found.rows:
        with short.patched({CROSS.format(0): zero_heads([row.head or 0])}):
            ablated = [answer_logprobs(short, case) for case in cases]
            answers = [short.run(*request) for request in requests]
        assert row.drop == pytest.approx(mean_drop(cases, ablated), abs=1e-6)
        changed = sum(a.token_ids != c.answer.token_ids for a, c in zip(answers, cases, strict=True)) / 2
        assert row.changed == changed
    assert any(row.changed for row in found.rows)


def loud_head(f: Florence2, loud: int) -> Florence2:
    """Return a copy in which one head of the last layer's cross-attention speaks much louder than the others."""
    model = copy.deepcopy(f.model)
    attention = model.language_model.decoder.layers[1].encoder_attn
    with torch.no_grad():
        scales = torch.full((4, 1), 0.05)
        scales[loud] = 3.0
        attention.out_proj.weight *= scales.expand(4, 8).reshape(32)
    found = Florence2(model, f.processor)
    found._options = f._options
    return found


@pytest.mark.parametrize("loud", [1, 2])
def test_the_head_that_locations_hang_on_moves_the_boxes(short: Florence2, requests: list[Request], loud: int) -> None:
    found = ablate_heads(loud_head(short, loud), requests, layers=[1])
    assert found.sorted("locations").rows[0].head == loud == found.sorted("shift").rows[0].head
    first, second = found.sorted("shift").rows[:2]
    assert first.shift > 3 * second.shift


@pytest.fixture(scope="module")
def nano() -> Florence2:
    """Load the specimen with greedy search."""
    f = load("nano")
    f._options = f.options(num_beams=1, max_new_tokens=30)
    return f


@pytest.fixture(scope="module")
def located(nano: Florence2) -> list[ForcedAnswer]:
    """Where is the first thing of each scene? With the specimen's own answers."""
    scenes = [make_scene(3, i) for i in range(6)]
    cases = [teacher_force(nano, (GROUNDING, nano.encode_image(s.image), caption(s.things[:1]))) for s in scenes]
    assert all(case.answer.boxes for case in cases)
    return cases


@pytest.fixture(scope="module")
def predicted(nano: Florence2, located: list[ForcedAnswer]) -> tuple[Ablation, ...]:
    """Every head of the cross-attention switched off, without generating anything."""
    return ablate_heads(nano, [case.request for case in located]).rows


@pytest.fixture(scope="module")
def patched_answers(
    nano: Florence2, located: list[ForcedAnswer], predicted: tuple[Ablation, ...]
) -> list[list[Answer]]:
    """Generate new answers without each head."""
    answers = []
    for row in predicted:
        with nano.patched({row.name: zero_heads([row.head or 0])}):
            answers.append([nano.run(*case.request) for case in located])
    return answers


@pytest.mark.release  # answers without each of twelve heads
def test_on_the_specimen_boxes_move_as_the_sweep_predicts(
    located: list[ForcedAnswer], predicted: tuple[Ablation, ...], patched_answers: list[list[Answer]]
) -> None:
    """The further the sweep says that locations shift without a head, the further boxes move without it."""
    moved = [
        sum(
            1 - mean_iou([box.xyxy for box in case.answer.boxes], answer.boxes, answer.image_size)
            for case, answer in zip(located, answers, strict=True)
        )
        for answers in patched_answers
    ]
    assert max(moved) > 0.1 * len(located)
    # 0.7 to 1 for specimens and scenes of several kinds, at most 0.3 when the heads of a layer are mixed up
    assert float(torch.corrcoef(torch.tensor([[row.shift for row in predicted], moved]))[0, 1]) > 0.5


@pytest.mark.release
def test_on_the_specimen_words_are_those_predicted(
    nano: Florence2, located: list[ForcedAnswer], predicted: tuple[Ablation, ...], patched_answers: list[list[Answer]]
) -> None:
    """The answer without a head is the old one up to where another id is likelier there, and continues with that id."""
    changed = 0
    for row, answers in zip(predicted, patched_answers, strict=True):
        for case, answer in zip(located, answers, strict=True):
            with nano.patched({row.name: zero_heads([row.head or 0])}):
                likeliest = answer_scores(nano, case).argmax(dim=1).tolist()
            old = case.answer.token_ids[1:]
            other = [n for n in case.positions() if likeliest[n] != old[n]]
            expected = (*old[: other[0]], likeliest[other[0]]) if other else old
            assert answer.token_ids[1:][: len(expected)] == expected
            changed += bool(other)
    assert 0 < changed < len(predicted) * len(located)


@pytest.mark.release
def test_on_the_specimen_a_patch_is_a_model_without_the_head(
    nano: Florence2, located: list[ForcedAnswer], predicted: tuple[Ablation, ...], patched_answers: list[list[Answer]]
) -> None:
    strongest = max(range(len(predicted)), key=lambda n: predicted[n].drop)
    row = predicted[strongest]
    path = f"language_model.{row.name.removesuffix('.cross_attention.heads')}.encoder_attn"
    without = without_head(nano, path, row.head or 0)
    answers = [without.run(*case.request, options=nano.options()) for case in located]
    assert [a.token_ids for a in answers] == [a.token_ids for a in patched_answers[strongest]]
    assert row.drop == pytest.approx(mean_drop(located, [forced(without, case) for case in located]), abs=1e-4)


@pytest.mark.parametrize("kind", ["window", "channel"])
def test_heads_of_the_vision_tower(
    short: Florence2, requests: list[Request], cases: list[ForcedAnswer], kind: str
) -> None:
    """Their layers are counted over all blocks; the image is encoded again."""
    found = ablate_heads(short, requests, kind=kind, layers=[1])
    assert [row.head for row in found.rows] == [0, 1, 2, 3]
    block = "spatial_block.window_attn" if kind == "window" else "channel_block.channel_attn"
    path = f"vision_tower.blocks.1.0.{block}"
    model = copy.deepcopy(short.model)
    projection = model.get_submodule(path).proj
    with torch.no_grad():
        projection.weight[:, 8:16] = 0  # the second of four
    ablated = [forced(Florence2(model, short.processor), case) for case in cases]
    assert found.rows[1].name == f"{path}.heads"
    assert found.rows[1].drop == pytest.approx(mean_drop(cases, ablated), abs=1e-5)
    assert found.rows[1].part == f"{path} head 1"


def test_sub_layers_at_zero(short: Florence2, requests: list[Request], cases: list[ForcedAnswer]) -> None:
    found = {row.name: row for row in ablate_blocks(short, requests, layers=[1]).rows}
    parts = ("self_attention", "cross_attention", "mlp")
    assert list(found) == [f"decoder.layers.1.{part}" for part in parts]
    model = copy.deepcopy(short.model)
    layer = model.language_model.decoder.layers[1]
    with torch.no_grad():
        layer.fc2.weight.zero_(), layer.fc2.bias.zero_()
    ablated = [forced(Florence2(model, short.processor), case) for case in cases]
    assert found["decoder.layers.1.mlp"].drop == pytest.approx(mean_drop(cases, ablated), abs=1e-5)


@pytest.mark.parametrize("stack", ["decoder", "encoder"])
def test_whole_layers_passed_over(
    short: Florence2, requests: list[Request], cases: list[ForcedAnswer], stack: str
) -> None:
    found = ablate_blocks(short, requests, stack=stack, whole=True)
    assert [row.name for row in found.rows] == [f"{stack}.layers.0", f"{stack}.layers.1"]
    for number, row in enumerate(found.rows):
        model = copy.deepcopy(short.model)
        del getattr(model.language_model, stack).layers[number]
        ablated = [forced(Florence2(model, short.processor), case) for case in cases]
        assert row.drop == pytest.approx(mean_drop(cases, ablated), abs=1e-5)


def test_blocks_of_the_vision_tower_passed_over(short: Florence2, requests: list[Request]) -> None:
    found = ablate_blocks(short, requests[:1], stack="vision", whole=True)
    kinds = ("spatial_block", "channel_block")
    assert [row.name for row in found.rows] == [f"vision_tower.blocks.{s}.0.{k}" for s in (0, 1) for k in kinds]
    t = teacher_force(short, requests[0])
    with (
        short.patched({"vision_tower.blocks.1.0.channel_block": lambda x: x}),
        short.trace("=vision_tower.blocks.1.0.spatial_block") as seen,
    ):
        short.run(*requests[0])
    before = seen["vision_tower.blocks.1.0.spatial_block"]
    with short.patched({"vision_tower.blocks.1.0.channel_block": before}):
        expected = float((t.logprobs - answer_logprobs(short, t, "image"))[t.positions()].mean())
    assert found.rows[3].drop == pytest.approx(expected, abs=1e-5) and abs(expected) > 1e-3
    inside = ablate_blocks(short, requests[:1], stack="vision", layers=[3])
    assert [row.name.rpartition(".")[2] for row in inside.rows] == ["channel_attn", "ffn"]


def test_boxes(short: Florence2, requests: list[Request], monkeypatch: pytest.MonkeyPatch) -> None:
    """With answers that are known: the unablated box is the whole image, then come its left half, nothing, ..."""

    def said(text: str) -> Answer:
        return short.processor.answer("<REGION_PROPOSAL>", text, image_size=(1000, 1000))

    before = said("<loc_0><loc_0><loc_999><loc_999>")
    later = iter([said("<loc_0><loc_0><loc_499><loc_999>"), said(""), before, before])
    made = teacher_force(short, ("<REGION_PROPOSAL>", requests[0][1]), "a<loc_0><loc_0><loc_999><loc_999>")
    made = replace(made, answer=replace(made.answer, boxes=before.boxes, image_size=before.image_size))
    monkeypatch.setattr(sweep_module, "teacher_force_all", lambda *_: [made])
    monkeypatch.setattr(sweep_module, "answer_again", lambda *_: next(later))
    rows = ablate_heads(short, [made.request], layers=[0], expected=[[before.boxes[0].xyxy, (0, 0, 500, 1000)]]).rows
    assert [row.moved for row in rows] == pytest.approx([0.5, 1, 0, 0], abs=2e-3)
    # the mean IoU with the two expected boxes was (1 + 0.5) / 2, is then (0.5 + 1) / 2, then 0
    assert [row.iou for row in rows] == pytest.approx([0, -0.75, 0, 0], abs=2e-3)


def test_stopped_and_resumed(
    short: Florence2, requests: list[Request], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "rows.jsonl"
    measured: list[Any] = []
    whole = ablate_heads(short, requests, layers=[0])
    original = sweep_module._measure

    def measure(most: int, *arguments: Any) -> Any:
        if len(measured) == most:
            raise KeyboardInterrupt
        measured.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(sweep_module, "_measure", partial(measure, 2))
    with pytest.raises(KeyboardInterrupt):
        ablate_heads(short, requests, layers=[0], out=out)
    assert [row.head for row in read_rows(out)] == [0, 1]
    with out.open("a") as file:
        file.write('{"name": "decoder.layers.0.cross')  # as when the machine went down
    monkeypatch.setattr(sweep_module, "_measure", partial(measure, 9))
    assert ablate_heads(short, requests, layers=[0], out=out) == whole
    assert [part.head for part in measured] == [0, 1, 2, 3]
    assert tuple(read_rows(out)) == whole.rows
    assert ablate_heads(short, requests, layers=[0], out=str(out)) == whole and len(measured) == 4


def test_rows_of_another_sweep_are_not_taken(
    short: Florence2, requests: list[Request], tmp_path: Path, images: list[Image.Image]
) -> None:
    out = tmp_path / "rows.jsonl"
    ablate_heads(short, requests, layers=[0], out=out)
    other = copy.deepcopy(short.model)
    with torch.no_grad():  # one number, which no answer hangs on
        other.language_model.decoder.layers[1].encoder_attn.out_proj.weight[5, 9] += 1e-5
    fine = Florence2(other, short.processor)
    fine._options = short._options
    for model, asked, more in (
        (fine, requests, {}),
        (short, requests[:1], {}),
        (short, [requests[0], (requests[1][0], images[1], "a red square")], {}),
        (short, requests, {"generate": True}),
    ):
        with pytest.raises(OptionError, match="of another checkpoint, other requests or other settings"):
            ablate_heads(model, asked, layers=[0], out=out, **more)
    (tmp_path / "other.jsonl").write_text("hello\n")
    with pytest.raises(OptionError, match=r"other.jsonl is not the file of a sweep"):
        ablate_heads(short, requests, out=tmp_path / "other.jsonl")
    with pytest.raises(OptionError, match=r"other.jsonl/rows.jsonl cannot be written"):
        ablate_heads(short, requests, out=tmp_path / "other.jsonl" / "rows.jsonl")
    for row in ("[1]", '{"name": "memory"}'):
        (tmp_path / "odd.jsonl").write_text(out.read_text().splitlines()[0] + f"\n{row}\n")
        with pytest.raises(OptionError, match=r"odd.jsonl is not the file of a sweep"):
            ablate_heads(short, requests, layers=[0], out=tmp_path / "odd.jsonl")


def test_progress_goes_to_the_callback_and_nowhere_else(
    short: Florence2, requests: list[Request], capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[tuple[int, int]] = []
    ablate_heads(short, requests[:1], layers=[1], progress=lambda done, total: shown.append((done, total)))
    assert shown == [(1, 4), (2, 4), (3, 4), (4, 4)]
    ablate_blocks(short, requests[:1], layers=[1], progress=lambda done, total: shown.append((done, total)))
    assert shown[4:] == [(1, 3), (2, 3), (3, 3)]
    assert capsys.readouterr() == ("", "")


def test_the_table(short: Florence2, requests: list[Request]) -> None:
    found = ablate_heads(short, requests)
    assert [row.drop for row in found.sorted().rows] == sorted((row.drop for row in found.rows), reverse=True)
    assert json.loads(found.to_json())["rows"][3] == json.loads(json.dumps(vars(found.rows[3])))
    lines = found.sorted("locations").format(3).splitlines()
    assert lines[0].split() == ["part", "drop", "words", "locations", "shift"] and len(lines) == 4
    best = max(found.rows, key=lambda row: row.locations or 0.0)
    assert lines[1].startswith(best.part) and f"{best.locations:.4f}" in lines[1]
    assert str(found) == found.format() and len(str(found).splitlines()) == 9
    assert len({len(line) for line in lines}) == 1
    with pytest.raises(OptionError, match="'moved' was not measured"):
        found.sorted("moved")
    with pytest.raises(OptionError, match="Unknown column 'size'"):
        found.sorted("size")
    assert isinstance(found, Sweep)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "crossed"}, "Unknown kind of heads 'crossed'. Known kinds: cross_attention"),
        ({"layers": [2]}, "for cross_attention this checkpoint has the layers 0 to 1"),
        ({"layers": 1}, "layers is 1; for cross_attention"),
        ({"layers": [0.5]}, r"layers is \[0.5\]; for cross_attention"),
        ({"expected": [[(0, 0, 9, 9)], [(1, 2)]]}, r"The expected box \(1, 2\) must be left, top, right, bottom"),
        ({"layers": []}, "has the layers 0 to 1"),
        ({"expected": [[(0, 0, 1, 1)]]}, "2 requests need 2 lists of expected boxes"),
        ({"expected": [[(0, 0, 1, 1)], []]}, "none of them empty"),
    ],
)
def test_what_cannot_be_swept(short: Florence2, requests: list[Request], more: dict, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        ablate_heads(short, requests, **more)


def test_stacks_that_do_not_exist(short: Florence2, requests: list[Request]) -> None:
    with pytest.raises(OptionError, match="Unknown stack of layers 'tower'. Known stacks: decoder, encoder, vision"):
        ablate_blocks(short, requests, stack="tower")
