"""Scores of examples with answers, by hand, and where the truth is the answer."""

from collections.abc import Sequence
from pathlib import Path
from statistics import mode
from typing import Any

import pytest

from florence2.evaluate.phrases import boxes_of_phrases
from florence2.evaluate.protocols import PROTOCOLS, find_protocol
from florence2.evaluate.scoring import AnsweredExample, score_table, truth_mask
from florence2.evaluate.tables.captions import References
from florence2.evaluate.tables.catalogue import TABLES, read_table
from florence2.evaluate.tables.detection import Instance
from florence2.evaluate.tables.entities import Phrase, Phrases
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.evaluate.tables.expressions import Referent
from florence2.evaluate.tables.questions import PeopleAnswers
from parity.metric_cases import draw_sentences
from parity.record_metrics import SEEDS
from parity.records import read_record

SQUARE = [2.0, 2, 12, 2, 12, 12, 2, 12]


def example(truth: Any, text: str | None = None, image: str = "1.jpg") -> BenchmarkExample[Any]:
    return BenchmarkExample("1", Path(image), text, truth)


def referent(outline: Any = (SQUARE,)) -> Referent:
    outline = [list(ring) for ring in outline] if isinstance(outline, tuple) else outline
    return Referent(Instance(1, (2, 2, 10, 10), 100, False, outline), 37, 29)


def boxes(*corners: Sequence[float], label: str = "") -> dict[str, Any]:
    return {"boxes": [{"xyxy": list(each), "label": label} for each in corners]}


def right(truth: Any, family: str) -> dict[str, Any]:
    """The answer that is right: what the model would have to say."""
    if family == "captions":
        return {"text": truth.references[0]}
    if family == "questions":
        return {"text": mode(truth.answers) if truth.answers else "yes"}
    if family == "phrases":
        return {"boxes": [{"xyxy": box, "label": each.words} for each in truth.phrases for box in each.boxes]}
    if family == "expressions":
        return boxes(truth.corners)
    if family == "masks":
        return {"polygons": [{"rings": truth.instance.outline}]}
    names = {number: name for name, number in truth.categories.items()}
    found = [(each, *each.box) for each in truth.objects.values()]
    return {
        "boxes": [
            {"xyxy": [left, top, left + width, top + height], "label": names[each.category].upper()}
            for each, left, top, width, height in found
        ]
    }


@pytest.mark.parametrize("name", TABLES)
def test_right_answers_have_the_best_score_and_none_the_worst(name: str, data: Path) -> None:
    family, examples = TABLES[name].family, read_table(name, data)
    for protocol in PROTOCOLS[family]:
        count = len(protocol.questions(examples[0]))
        best = score_table(family, [AnsweredExample(each, [right(each.truth, family)] * count) for each in examples])
        worst = score_table(family, [AnsweredExample(each, [{}] * count) for each in examples])
        if family == "captions":  # the most that CIDEr can be depends on the references
            assert best[0].value > 95
        else:
            assert best[0].value == pytest.approx(100)
        assert all(score.value == 0 for score in worst)


def test_tables_whose_answers_are_not_published(data: Path) -> None:
    examples = [AnsweredExample(each, [{"text": "yes"}]) for each in read_table("vqav2:test-dev", data)]
    assert score_table("questions", examples) == []


@pytest.mark.parametrize(
    ("answers", "value"),
    [
        ([boxes()], 0),
        ([boxes((2, 2, 12, 7))], 100),  # an IoU of exactly one half
        ([boxes((2, 2, 12, 6.9))], 0),
        ([boxes((30, 2, 35, 7), (2, 2, 12, 12))], 0),
        ([boxes(), boxes((2, 2, 12, 12))], 100),
        ([boxes((30, 2, 35, 7)), boxes((2, 2, 12, 12))], 0),
    ],
)
def test_expressions(answers: list[dict[str, Any]], value: float) -> None:
    (score,) = score_table("expressions", [AnsweredExample(example(referent()), answers)])
    assert (score.metric, score.value, score.interval) == ("accuracy", value, None)


def test_masks() -> None:
    half = {"polygons": [{"rings": [[2, 2, 7, 2, 7, 12, 2, 12]]}]}
    two = {"polygons": [{"rings": [[2, 2, 12, 2, 12, 7, 2, 7]]}, {"rings": [[2, 7, 12, 7, 12, 12, 2, 12]]}]}
    answered = [AnsweredExample(example(referent()), [answer]) for answer in (half, two, {})]
    mean, overall = score_table("masks", answered)
    assert (mean.metric, overall.metric) == ("mIoU", "oIoU")
    assert [mean.value, overall.value] == pytest.approx([50, 50])


def test_masks_of_run_lengths() -> None:
    assert truth_mask(referent({"size": [29, 37], "counts": [29 * 37 - 5, 5]})).sum() == 5
    for outline in ({"size": [29, 37], "counts": "!"}, {"size": [29, 37], "counts": [3]}, None):
        with pytest.raises(TableError):
            truth_mask(referent(outline))


def test_phrases() -> None:
    truth = Phrases([Phrase("a man", [(0, 0, 10, 10), (20, 0, 30, 10)]), Phrase("a dog", [(0, 20, 10, 30)])])
    answer = {"boxes": boxes((20, 0, 30, 10), label="A man")["boxes"] + boxes((0, 0, 9, 9), label="a cat")["boxes"]}
    either, merged = score_table("phrases", [AnsweredExample(example(truth), [answer])])
    assert (either.variant, either.value) == ("any-box", 50)
    assert (merged.variant, merged.value) == ("merged", 0)


@pytest.mark.parametrize(("variant", "name"), [("any-box", "any"), ("merged", "merged")])
def test_recall_of_phrases_as_recorded(variant: str, name: str) -> None:
    """It is that of MDETR's evaluator, recorded by `python -m parity.record_metrics`."""
    expected = read_record("evaluate/flickr.json")[name]
    assert len(expected) == 500
    recalls = []
    for drawn in draw_sentences(len(expected), SEEDS["sentences"]):
        truth = Phrases([Phrase(f"phrase {each.id}", list(each.truths)) for each in drawn])
        answer = {"boxes": [{"xyxy": box, "label": f"phrase {each.id}"} for each in drawn for box in each.boxes]}
        scores = score_table("phrases", [AnsweredExample(example(truth), [answer])])
        recalls.append({score.variant: score.value for score in scores}[variant])
    assert recalls == pytest.approx([100 * recall for recall in expected])
    assert 20 < sum(recalls) / len(recalls) < 90


def test_the_two_recalls_differ() -> None:
    recorded = read_record("evaluate/flickr.json")
    assert recorded["any"] != recorded["merged"]


def test_a_phrase_that_occurs_twice() -> None:
    answer = {
        "boxes": [
            *boxes((1, 1, 2, 2), (3, 3, 4, 4), label="a man")["boxes"],
            *boxes((9, 9, 10, 10), label="a dog")["boxes"],
            *boxes((5, 5, 6, 6), label="a man")["boxes"],
        ]
    }
    assert boxes_of_phrases(answer, ["a man", "A  Man", "a man", "a cat"]) == [
        *([[1, 1, 2, 2], [3, 3, 4, 4]], [[5, 5, 6, 6]], [], [])
    ]


def test_domains_of_captions() -> None:
    texts = [("a b c d", "in"), ("e f g h", "out")]
    answered = [
        AnsweredExample(example(References([text], domain), image=domain), [{"text": text if domain == "in" else ""}])
        for text, domain in texts
    ]
    scores = score_table("captions", answered)
    assert [score.variant for score in scores] == ["", "in", "out"]
    assert [score.value for score in scores] == pytest.approx([500, 1000, 0])


def test_some_images_have_the_frequencies_of_all(data: Path) -> None:
    examples = read_table("nocaps", data)
    answered = [AnsweredExample(each, [right(each.truth, "captions")]) for each in examples]
    part, whole = score_table("captions", answered[:3], examples), score_table("captions", answered)
    assert part[0].value != score_table("captions", answered[:3])[0].value
    assert 0 < part[0].value < 2 * whole[0].value


def test_people() -> None:
    truth = PeopleAnswers(["cat"] * 8 + ["dog"] * 2, 1)
    (score,) = score_table("questions", [AnsweredExample(example(truth), [{"text": "The dog."}])])
    assert score.value == pytest.approx(100 * (2 * 1 / 3 + 8 * 2 / 3) / 10)


def test_intervals_are_those_of_images() -> None:
    answered = [
        AnsweredExample(example(referent(), image=str(i)), [boxes((2, 2, 12, 12)) if i % 2 else {}]) for i in range(40)
    ]
    (score,) = score_table("expressions", answered)
    low, high = score.interval or (0, 0)
    assert 30 < low < 40 < score.value == 50 < 60 < high < 70


def test_questions_of_the_protocols() -> None:
    asked = {
        (family, protocol.name): [
            (question.name, question.text) for question in protocol.questions(example(None, "a dog"))
        ]
        for family, protocols in PROTOCOLS.items()
        for protocol in protocols
    }
    assert asked["captions", "detailed"] == [("<DETAILED_CAPTION>", None)]
    assert asked["expressions", "ovd-then-grounding"] == [
        *(("<OPEN_VOCABULARY_DETECTION>", "a dog"), ("<CAPTION_TO_PHRASE_GROUNDING>", "a dog"))
    ]
    assert asked["questions", "free-prompt"] == [("a dog", None)]


def test_a_question_that_looks_like_a_task_stays_a_prompt() -> None:
    question = find_protocol("questions", None).questions(example(None, "od"))[0]
    assert question.to_dict() == {"task": "od"}


def test_unknown_protocols() -> None:
    with pytest.raises(TableError, match=r"Unknown protocol 'x' for masks\. Known protocols: res\."):
        find_protocol("masks", "x")
