"""Constrained decoding: every text outside of locations is one of the labels, in every search and path."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import florence2
from florence2 import Florence2, OnlyLabels
from florence2.errors import OptionError
from florence2.inputs.tasks import TASKS
from recipes.nano.scenes import make_scene
from tests.release import keep

LABELS = ["red circle", "red", "blue square", "large thing", "car"]
"""None of them is what nano calls a thing; one is the beginning of another."""
SEARCHES: list[dict[str, Any]] = [
    {"num_beams": 1},
    {"num_beams": 3},
    {"num_beams": 3, "no_repeat_ngram_size": 3, "num_return_sequences": 3},
    {"sample": True, "seed": 3, "num_return_sequences": 2},
]


@pytest.fixture(scope="module")
def nano() -> Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="module")
def eager() -> Florence2:
    return florence2.load("nano", device="cpu", attention="eager")


@pytest.fixture(scope="module")
def scenes() -> list[Image.Image]:
    """Two scenes of several things."""
    scenes = [make_scene(5, index) for index in range(30)]
    return [scene.image for scene in scenes if len(scene.things) > 3][:2]


def test_it_applies_at_every_step(nano: Florence2) -> None:
    rule = OnlyLabels(LABELS, nano.processor)
    assert all(rule.applies(generated) for generated in (0, 1, 99))


def texts(raw: str) -> list[str]:
    """The texts between locations and markers."""
    return [text for text in re.split(r"(?:<loc_\d+>|<s>|</s>|<pad>)+", raw) if text]


ASKED = [("<OD>", None), ("<OPEN_VOCABULARY_DETECTION>", ["a circle", "a star"])]


@pytest.mark.parametrize(
    ("task", "text", "changes"),
    keep([0, 5, 6, 7], [(*asked, changes) for asked in ASKED for changes in SEARCHES]),  # every search once
    ids=str,
)
def test_every_label_is_one_of_the_list(
    nano: Florence2, eager: Florence2, scenes: list[Image.Image], task: str, text: Any, changes: dict[str, Any]
) -> None:
    rule = OnlyLabels(LABELS, nano.processor)
    options = nano.options(max_new_tokens=60, min_new_tokens=8, extra_rules=(rule,), **changes)
    for image in scenes:
        answer = nano.run(task, image, text, options=options)
        assert answer.boxes
        for each in (answer, *answer.alternatives):
            if each.finish_reason == "stop":
                assert {*texts(each.raw_text)} <= {*LABELS}
                assert re.fullmatch(r"</s><s>([^<]+(<loc_\d+>){4,})+</s>", each.raw_text)
                assert each.raw_text.count("<loc_") % 4 == 0
        assert eager.run(task, image, text, options=options).token_ids == answer.token_ids
        with nano.trace("=logits") as t:
            assert nano.run(task, image, text, options=options).token_ids == answer.token_ids
        assert t.along_answer("logits").shape[0] == len(answer.token_ids) - 1
    free = nano.run(task, scenes[0], text, options=options.changed(extra_rules=()))
    assert not {*texts(free.raw_text)} <= {*LABELS}


@pytest.mark.parametrize("changes", SEARCHES, ids=str)
def test_a_text_is_exactly_one_label(
    nano: Florence2, eager: Florence2, scenes: list[Image.Image], changes: dict[str, Any]
) -> None:
    labels = ["a red car", "a red", "blue"]
    rule = OnlyLabels(labels, nano.processor.tokenizer, locations=0)
    for image in scenes:
        answer = nano.run("<CAPTION>", image, extra_rules=(rule,), **changes)
        assert answer.text in labels and answer.finish_reason == "stop"
        assert eager.run("<CAPTION>", image, extra_rules=(rule,), **changes).token_ids == answer.token_ids


def test_a_batch_gives_what_each_request_gives_alone(nano: Florence2, scenes: list[Image.Image]) -> None:
    options = nano.options(max_new_tokens=40, extra_rules=(OnlyLabels(LABELS, nano.processor),))
    requests = [("<OD>", image) for image in scenes]
    together = nano.run_batch(requests, options=options)
    assert [a.token_ids for a in together] == [nano.run(*request, options=options).token_ids for request in requests]


def test_the_grammar(nano: Florence2) -> None:
    rule = OnlyLabels(["red", "red circle", "blue"], nano.processor)
    red, circle, blue = (nano.processor.encode(text)[1:-1] for text in ("red", " circle", "blue"))
    begin, end, places = 0, 2, {*range(611, 1611)}
    assert nano.processor.tokenizer.token_id("<loc_999>") == 1610
    starts = {red[0], blue[0]}

    def following(*ids: int) -> set[int]:
        return {*rule.following(ids)}

    assert following() == {begin, end} | starts
    assert following(begin) == {end} | starts
    assert following(begin, *red) == {circle[0]} | places and following(*red) == {circle[0]} | places
    assert following(begin, *red, *circle) == places
    for count in (1, 2, 3, 5):
        assert following(begin, *red, *[700] * count) == places
    for count in (4, 8):
        assert following(begin, *red, *[700] * count) == places | starts | {end}
    assert following(begin, *red, *[700] * 4, *red) == {circle[0]} | places
    assert following(begin, 99) == following(begin, *red, 99) == {end}


def test_the_grammar_of_texts_and_quads(nano: Florence2) -> None:
    red = nano.processor.encode("red")[1:-1]
    text = OnlyLabels(["red"], nano.processor, locations=0, end=7)
    assert text.following([0]) == red[:1] and text.following([0, *red]) == [7]
    quads = OnlyLabels(["red"], nano.processor, locations=8)
    assert 2 not in quads.following([0, *red, *[700] * 4]) and 2 in quads.following([0, *red, *[700] * 8])


def test_labels_win_over_what_earlier_rules_forbid(nano: Florence2) -> None:
    rule = OnlyLabels(["red"], nano.processor)
    red = nano.processor.encode("red")[1]
    scores = torch.zeros(1, nano.model.config.text.vocab_size)
    scores[0, [red, 2]] = -torch.inf
    changed = rule(scores, torch.tensor([[2, 0, 1, 1]]), torch.tensor([1]))
    assert changed[0].exp().nonzero()[:, 0].tolist() == [2, red]
    assert float(changed[0].exp().sum()) == pytest.approx(1.0)


def test_labels_are_cut_as_after_a_location(nano: Florence2) -> None:
    """A tokenizer that writes a word in another way where it begins the text."""

    class Cutting:
        def encode(self, text: str) -> list[int]:
            places = [611 + int(bin) for bin in re.findall(r"<loc_(\d+)>", text)]
            words = re.sub(r"<loc_\d+>", "", text)
            return [0, *places, *([50 if places else 40] if words else []), 2]

    rule = OnlyLabels(["word"], Cutting())
    assert rule.following([0]) == [40, 2]
    assert {*rule.following([0, 40, 611, 611, 611, 611])} >= {50, 2}
    assert nano.processor.encode("<loc_0>red circle")[2:] == nano.processor.encode("red circle")[1:]


@pytest.mark.parametrize(
    ("labels", "settings", "words"),
    [
        ([], {}, "an empty list of labels"),
        (["red", " "], {}, "the label ' '; give at least one label"),
        (["red", 3], {}, "the label 3"),
        ("red", {}, "labels is 'red'; give a list of words"),
        (["a<loc_3>"], {}, "'a<loc_3>' contains special tokens"),
        (["red"], {"locations": -1}, "locations is -1"),
        (["red"], {"tokenizer": "nano"}, "tokenizer is 'nano', which cannot encode text; give f.processor"),
    ],
)
def test_wrong_labels(nano: Florence2, labels: Any, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        OnlyLabels(labels, **{"tokenizer": nano.processor, **settings})


def test_the_published_tasks_have_labels_before_locations(small_folder: Path) -> None:
    """With the published vocabulary too: no space before a label, at the beginning or after a location."""
    f = florence2.load(small_folder)
    assert TASKS["<OD>"].answer == "boxes"
    for label in ("car", "traffic light", "Straße"):
        ids = f.processor.encode(label)
        assert f.processor.encode(f"<loc_0>{label}")[2:] == ids[1:] and f.processor.decode(ids[1:-1]) == label
