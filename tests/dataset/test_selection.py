"""Which rows a view shows where a folder holds several tasks."""

from pathlib import Path

import pytest

from florence2.dataset.selection import choose_tasks
from florence2.dataset.views import EVERYTHING, QUADS, REGIONS, TEXTS
from florence2.errors import OptionError

COUNTS = {("<OD>", "boxes"): 1234, ("<OD>", "error"): 1, ("<CAPTION>", "text"): 3, ("<BAD>", "error"): 2}
OUT = Path("out")


def test_the_only_task_that_fits() -> None:
    assert choose_tasks(COUNTS, "coco", REGIONS, [], OUT) == ["<OD>"]
    assert choose_tasks(COUNTS, "captions", TEXTS, [], OUT) == ["<CAPTION>"]
    assert choose_tasks(COUNTS, "parquet", EVERYTHING, [], OUT) == ["<OD>", "<CAPTION>", "<BAD>"]


@pytest.mark.parametrize("name", ["od", "<OD>", "OD"])
def test_named_tasks(name: str) -> None:
    several = COUNTS | {("<DENSE_REGION_CAPTION>", "boxes"): 5, ("what is there?", "text"): 1}
    assert choose_tasks(several, "coco", REGIONS, [name], OUT) == ["<OD>"]
    assert choose_tasks(several, "coco", REGIONS, [name, "caption"], OUT) == ["<OD>"]
    assert choose_tasks(several, "csv", EVERYTHING, ["what is there?", name], OUT) == ["what is there?", "<OD>"]
    both = choose_tasks(several, "coco", REGIONS, ["dense_region_caption", name], OUT)
    assert both == ["<DENSE_REGION_CAPTION>", "<OD>"]


def test_several_tasks_that_fit() -> None:
    several = COUNTS | {("<DENSE_REGION_CAPTION>", "boxes"): 5}
    with pytest.raises(OptionError) as caught:
        choose_tasks(several, "coco", REGIONS, [], OUT)
    assert str(caught.value) == (
        "out holds answers to several tasks that fit the view coco: <DENSE_REGION_CAPTION> (5 rows, boxes), "
        "<OD> (1,234 rows, boxes), <OD> (1 row, failed). Choose with --task, as often as you like."
    )


def test_no_task_that_fits() -> None:
    with pytest.raises(OptionError, match=r"No answer in out fits the view yolo-obb. The folder holds <BAD> \(2 rows"):
        choose_tasks(COUNTS, "yolo-obb", QUADS, [], OUT)
    with pytest.raises(OptionError, match="fits the view coco"):
        choose_tasks(COUNTS, "coco", REGIONS, ["caption"], OUT)
    with pytest.raises(OptionError, match="out has no row of the task 'ocr'"):
        choose_tasks(COUNTS, "coco", REGIONS, ["ocr"], OUT)
    with pytest.raises(OptionError, match="The folder holds no rows"):
        choose_tasks({}, "coco", REGIONS, [], OUT)
