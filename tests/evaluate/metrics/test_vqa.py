"""VQA accuracy, against that of the official code, which `python -m parity.record_metrics` recorded."""

import pytest

from florence2.evaluate.metrics.vqa import normalize_answer, vqa_accuracy
from parity.metric_cases import draw_answers
from parity.record_metrics import SEEDS
from parity.records import read_record


def test_recorded() -> None:
    expected = read_record("evaluate/vqa.json")
    cases = draw_answers(len(expected), SEEDS["answers"])
    assert len(expected) == 20_000
    own = [round(30 * vqa_accuracy(answer, truths)) for answer, truths in cases]
    assert [case for case, mine, other in zip(cases, own, expected, strict=True) if mine != other] == []
    assert set(expected) == {0, 9, 18, 27, 30}


@pytest.mark.parametrize(
    ("answer", "normal"),
    [
        ("The two dogs.", "2 dogs"),
        ("black/white", "black white"),
        ("black /white", "black white"),
        ("black, white", "black white"),
        ("1,000", "1000"),
        ("10.5", "10.5"),
        ("u.s.", "us"),
        ("dont", "don't"),
        ("somebody'd", "somebodyd"),
        ("None", "0"),
        ("." * 40, "." * 8),  # no more than 32 are removed
    ],
)
def test_normalized(answer: str, normal: str) -> None:
    assert normalize_answer(answer) == normal


def test_each_person_is_left_out_once() -> None:
    truths = ["cat"] * 3 + ["dog"] * 7
    assert vqa_accuracy("dog", truths) == 1
    assert vqa_accuracy("cat", truths) == pytest.approx((3 * 2 / 3 + 7 * 1) / 10)
    assert vqa_accuracy("cow", truths) == 0


def test_answers_on_which_all_agree_are_not_normalized() -> None:
    assert vqa_accuracy("two", ["2"] * 10) == 0
    assert vqa_accuracy("two", ["2"] * 9 + ["3"]) == 1


def test_no_truths() -> None:
    with pytest.raises(ValueError, match="at least one"):
        vqa_accuracy("a", [])
