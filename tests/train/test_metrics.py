"""Every metric against cases computed by hand, through the parser."""

from dataclasses import replace

import pytest

from florence2.answers.answer import Answer, Box, parse_answer
from florence2.inputs.tasks import TASKS, Task, find_task
from florence2.train.metrics import (
    FREE_PROMPTS,
    format_metrics,
    measure_boxes,
    measure_by_task,
    measure_polygons,
    measure_quads,
    measure_text,
)
from florence2.train.targets import boxes_target, polygons_target, quads_target

SIZE = (1000, 1000)  # a bin is a pixel
LEFT, RIGHT, TOP_HALF = (100, 100, 300, 300), (600, 100, 800, 300), (100, 100, 300, 200)
STOP = (100, 100, 300, 100, 300, 200, 100, 200)
GO = (500, 500, 600, 500, 600, 600, 500, 600)


def read(task: str, text: str) -> Answer:
    """A text as the answer to a task."""
    found: Task | None = find_task(task)
    return parse_answer(task, found.answer if found else "text", text, SIZE)


def texts(*pairs: tuple[str, str]) -> list[tuple[Answer, Answer]]:
    return [(read("<OCR>", truth), read("<OCR>", answer)) for truth, answer in pairs]


def boxes(task: str, *rows: tuple[str, tuple[float, ...]]) -> Answer:
    return read(task, boxes_target(rows, SIZE))


def test_text() -> None:
    """One edit in 10 letters; one word of two; with the next pair, three words of four."""
    metrics = measure_text(texts(("STOP HERE", "</s><s>STOP THERE</s>")))
    assert metrics == pytest.approx({"exact_match": 0, "edit_similarity": 0.9, "word_accuracy": 0.5})
    metrics = measure_text(texts(("STOP HERE", "STOP THERE"), ("GO ON", " GO ON\n")))
    assert metrics == pytest.approx({"exact_match": 0.5, "edit_similarity": 0.95, "word_accuracy": 0.75})


@pytest.mark.parametrize(
    ("answer", "share"),
    [("a b c d", 1), ("b c d", 0.75), ("x a b c d", 1), ("d c b a", 0.25), ("a b a b", 0.5), ("", 0), ("A b c", 0.5)],
)
def test_words_count_in_their_order(answer: str, share: float) -> None:
    assert measure_text(texts(("a b c d", answer)))["word_accuracy"] == share


def test_an_empty_text_is_matched_by_an_empty_one() -> None:
    assert set(measure_text(texts(("", ""))).values()) == {1.0}
    assert measure_text(texts(("", "word")))["exact_match"] == 0


def test_boxes_of_a_perfect_model() -> None:
    truth = boxes("<OD>", ("cat", LEFT), ("cat", RIGHT), ("dog", LEFT))
    assert list(measure_boxes([(truth, truth), (truth, truth)]).values()) == pytest.approx([1] * 5)


def test_boxes() -> None:
    """Of three truths one is found, one has another label, one is missing; one box is found twice."""
    truth = boxes("<OD>", ("cat", LEFT), ("dog", RIGHT), ("dog", LEFT))
    answer = boxes("<OD>", ("cat", LEFT), ("cat", RIGHT), ("cat", LEFT))
    metrics = measure_boxes([(truth, answer)])
    assert [metrics[name] for name in ("precision", "recall", "f1")] == pytest.approx([1 / 3] * 3)
    assert metrics["map_50"] == pytest.approx(0.5)  # all of the cats, none of the dogs


def test_scores_decide_the_average_precision() -> None:
    truth = boxes("<OD>", ("cat", LEFT))
    answer = boxes("<OD>", ("cat", RIGHT), ("cat", LEFT))

    def scored(*scores: float) -> Answer:
        found = tuple(Box(box.xyxy, box.label, s) for box, s in zip(answer.boxes, scores, strict=True))
        return Answer(**{**vars(answer), "boxes": found})

    assert measure_boxes([(truth, scored(0.2, 0.9))])["map_50"] == pytest.approx(1)
    assert measure_boxes([(truth, scored(0.9, 0.2))])["map_50"] == pytest.approx(0.5)
    assert measure_boxes([(truth, scored(0.9, 0.2))])["f1"] == pytest.approx(2 / 3)


def test_an_iou_of_a_half_is_enough_and_less_is_not() -> None:
    truth = boxes("<REGION_PROPOSAL>", ("", LEFT))
    assert measure_boxes([(truth, boxes("<REGION_PROPOSAL>", ("", TOP_HALF)))])["f1"] == 1.0
    assert measure_boxes([(truth, boxes("<REGION_PROPOSAL>", ("", (100, 100, 300, 199))))])["f1"] == 0.0


def test_without_any_truth_there_is_no_average_precision() -> None:
    nothing, something = read("<OD>", ""), boxes("<OD>", ("cat", LEFT))
    assert measure_boxes([(nothing, nothing)]) == {"precision": 1, "recall": 1, "f1": 1}
    assert measure_boxes([(nothing, something)]) == {"precision": 0, "recall": 1, "f1": 0}
    assert measure_boxes([(something, nothing)]) == {
        "map_50": 0, "map_50_95": 0, "precision": 1, "recall": 0, "f1": 0
    }  # fmt: skip


def test_quads() -> None:
    def quads(*rows: tuple[str, tuple[float, ...]]) -> Answer:
        return read("<OCR_WITH_REGION>", quads_target(rows, SIZE))

    truth = quads(("STOP", STOP), ("GO", GO))
    assert set(measure_quads([(truth, truth)]).values()) == {1.0}
    other_text = quads(("STOP", STOP), ("G0", GO))
    assert set(measure_quads([(truth, other_text)]).values()) == {0.5}
    # turned by 45 degrees about the same centre, of a half more and of a fifth of the area
    for half, f1 in ((55, 1.0), (30, 0.5)):
        turned = (550, 550 - half, 550 + half, 550, 550, 550 + half, 550 - half, 550)
        assert measure_quads([(truth, quads(("STOP", STOP), ("GO", turned)))])["f1"] == f1
    missing = measure_quads([(truth, quads(("GO", GO)))])
    assert missing == pytest.approx({"precision": 1, "recall": 0.5, "f1": 2 / 3})


def outlines(*rings: tuple[float, ...]) -> Answer:
    return read("<REGION_TO_SEGMENTATION>", polygons_target(rings, SIZE))


def test_polygons() -> None:
    truth, upper = outlines(STOP), outlines((100, 100, 300, 100, 300, 150, 100, 150))
    assert measure_polygons([(truth, truth)]) == {"miou": 1.0}
    assert measure_polygons([(truth, upper)])["miou"] == pytest.approx(0.5, abs=0.01)
    assert measure_polygons([(truth, truth), (truth, outlines(GO))]) == {"miou": 0.5}
    assert measure_polygons([(truth, read("<REGION_TO_SEGMENTATION>", "I see nothing"))]) == {"miou": 0}
    both = measure_polygons([(outlines(STOP, GO), truth)])["miou"]
    assert both == pytest.approx(20_000 / 30_000, abs=0.01)


def test_of_what_is_not_there_boxes_and_outlines_are_wrong() -> None:
    task = "<OPEN_VOCABULARY_DETECTION>"
    nothing, outlined = read(task, ""), read(task, f"sign<poly>{polygons_target([STOP], SIZE)}</poly>")
    assert outlined.polygons and measure_by_task([(nothing, outlined)])[task]["miou"] == 0
    assert measure_by_task([(nothing, boxes(task, ("sign", LEFT)))])[task]["f1"] == 0
    assert measure_by_task([(nothing, nothing)])[task]["f1"] == 1


def test_a_label_matters_in_an_open_vocabulary_only() -> None:
    def labelled(task: str, label: str) -> Answer:
        rings = polygons_target([STOP], SIZE)
        return read(task, f"{label}<poly>{rings}</poly>" if label else rings)

    refer, detect = "<REFERRING_EXPRESSION_SEGMENTATION>", "<OPEN_VOCABULARY_DETECTION>"
    assert measure_polygons([(labelled(refer, ""), labelled(refer, "sign"))]) == {"miou": 1}
    assert measure_polygons([(labelled(detect, "sign"), labelled(detect, "sign"))]) == {"miou": 1}
    assert measure_polygons([(labelled(detect, "sign"), labelled(detect, "cat"))]) == {"miou": 0}


def test_by_task() -> None:
    """An open vocabulary is measured by what its truths hold; answers of the other form are misses."""
    detect = "<OPEN_VOCABULARY_DETECTION>"
    box = boxes(detect, ("cat", LEFT))
    outline = read(detect, f"cat<poly>{polygons_target([STOP], SIZE)}</poly>")
    free = read("How many?", "two")
    pairs = [(outline, outline), (box, box), (box, outline), *texts(("a", "b")), (free, free)]
    metrics = measure_by_task(pairs)
    assert list(metrics) == ["<OCR>", detect, FREE_PROMPTS]  # in the order of TASKS
    assert metrics["<OCR>"] == {"count": 1, "cut_off": 0, "exact_match": 0, "edit_similarity": 0, "word_accuracy": 0}
    assert metrics[detect]["count"] == 3 and metrics[detect]["miou"] == 1
    assert metrics[detect]["recall"] == 0.5 and metrics[detect]["precision"] == 1
    assert metrics[FREE_PROMPTS]["exact_match"] == 1


def test_answers_that_were_cut_off_are_counted() -> None:
    right, wrong = texts(("a", "a"), ("a", "b"))
    cut = (right[0], replace(right[1], finish_reason="length"))
    assert measure_by_task([right, cut, wrong, cut])["<OCR>"]["cut_off"] == 2


def test_every_kind_of_answer_is_measured() -> None:
    for task in TASKS.values():
        answer = read(task.token, "cat<loc_1><loc_2><loc_3><loc_4><loc_5><loc_6><loc_7><loc_8>")
        assert len(measure_by_task([(answer, answer)])[task.token]) > 1


def test_the_table() -> None:
    boxes = {"count": 12, "cut_off": 2, "map_50": 0.5, "f1": 2 / 3}
    table = format_metrics({"<OD>": boxes, "<OCR>": {"count": 3, "cut_off": 0, "exact_match": 1}})
    assert table.splitlines() == [
        "<OD>       12  map_50 0.500  f1 0.667  2 cut off",
        "<OCR>       3  exact_match 1.000",
    ]
