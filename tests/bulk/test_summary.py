"""The end of a run in words."""

from dataclasses import replace
from pathlib import Path

from florence2.answers.answer import Answer, Box, parse_answer
from florence2.answers.cascade import Cascade
from florence2.bulk.earlier import Earlier
from florence2.bulk.rows import Result, Row, TaskQuestion
from florence2.bulk.sources import Source
from florence2.bulk.summary import Summary

SOURCE, QUESTION = Source("a.png", Path("a.png"), "a"), TaskQuestion("<OD>")


def answer(finish_reason: str = "stop") -> Answer:
    return parse_answer("<OD>", "boxes", "", (10, 10), finish_reason=finish_reason)


def summed(*results: Result | str, limit: int | None = None, **more: str) -> Summary:
    summary = Summary(limit)
    for result in results:
        failed = isinstance(result, str)
        summary.add(Row(SOURCE, QUESTION, None if failed else result, result if failed else None, **more))
    return summary


def test_nothing_is_said_of_a_run_that_went_well() -> None:
    summary = summed(answer(), answer())
    assert summary.sentences() == [] and summary.complete


def test_failures_are_counted_but_a_single_one_is_not_said_twice() -> None:
    assert summed("bad", answer()).sentences() == ["1 of 2 answers failed."]
    assert summed("bad").sentences() == [] and not summed("bad").complete


def test_cut_answers_are_counted_with_the_limit() -> None:
    cut = summed(answer("length"), answer(), answer("length"), limit=8)
    assert cut.sentences() == ["2 of 3 answers were cut off at --max-new-tokens 8; a larger number gives the rest."]
    assert cut.complete
    (own,) = summed(answer("length")).sentences()
    assert own == "1 of 1 answer was cut off at the model's own token limit; --max-new-tokens N sets another."


def test_a_part_of_a_cascade_may_be_cut_off_or_missing() -> None:
    whole = Cascade(answer(), answer(), ())
    assert len(summed(replace(whole, grounding=answer("length"))).sentences()) == 1
    gap = summed(replace(whole, missing=("too long",)))
    assert gap.sentences() == ["1 of 1 answer was left incomplete."] and not gap.complete


def test_earlier_answers_count_like_new_ones() -> None:
    summary = Summary(8)
    summary.add_earlier(Earlier(requested=4, cut_off=2, incomplete=1, left_out=3))
    summary.add(Row(SOURCE, QUESTION, answer("length")))
    assert [sentence.split(";")[0] for sentence in summary.sentences()] == [
        "3 of 5 answers were cut off at --max-new-tokens 8",
        "1 of 5 answers was left incomplete.",
        "3 regions below --min-confidence were left out.",
    ]
    assert not summary.complete


def test_regions_left_out_are_counted() -> None:
    box = Box((0.0, 0.0, 1.0, 1.0), "cat", 0.1, 0.3)
    sure = replace(answer(), boxes=(box, box)).with_confidence(0.5)
    assert summed(sure).sentences() == ["2 regions below --min-confidence were left out."]
    assert summed(Cascade(answer(), sure, ())).complete


def test_drawings_that_failed_and_files_passed_over() -> None:
    summary = summed(answer(), drawing_error="The disk is full.")
    assert summary.sentences() == ["1 of 1 answer was not drawn. The first reason: The disk is full."]
    assert not summary.complete
    summary = Summary(passed_over=2)
    assert summary.sentences() == ["2 files in folders were passed over."] and summary.complete
