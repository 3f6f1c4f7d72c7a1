"""The published results, against the tables of the model card, copied by hand in another order."""

from florence2.evaluate.published import (
    MODELS,
    published_name,
    published_note,
    published_results,
    published_source,
    published_splits,
)
from florence2.evaluate.tables.catalogue import TABLES

CARD = {
    "base": """
        coco-caption:test CIDEr 133.0, nocaps:val CIDEr 118.7, textcaps:val CIDEr 70.1, coco-detection:val2017
        mAP 34.7, flickr30k:test R@1 83.6, refcoco:val accuracy 53.9, refcoco:testA accuracy 58.4, refcoco:testB
        accuracy 49.7, refcoco+:val accuracy 51.5, refcoco+:testA accuracy 56.4, refcoco+:testB accuracy 47.9,
        refcocog:val accuracy 66.3, refcocog:test accuracy 65.1, refcoco-res:val mIoU 34.6
    """,
    "large": """
        coco-caption:test CIDEr 135.6, nocaps:val CIDEr 120.8, textcaps:val CIDEr 72.8, coco-detection:val2017
        mAP 37.5, flickr30k:test R@1 84.4, refcoco:val accuracy 56.3, refcoco:testA accuracy 61.6, refcoco:testB
        accuracy 51.4, refcoco+:val accuracy 53.6, refcoco+:testA accuracy 57.9, refcoco+:testB accuracy 49.9,
        refcocog:val accuracy 68.0, refcocog:test accuracy 67.0, refcoco-res:val mIoU 35.8
    """,
    "base-ft": """
        coco-caption:test CIDEr 140.0, nocaps:val CIDEr 116.7, textcaps:val CIDEr 143.9, coco-detection:val2017
        mAP 41.4, flickr30k:test R@1 84.0, refcoco:val accuracy 92.6, refcoco:testA accuracy 94.8, refcoco:testB
        accuracy 91.5, refcoco+:val accuracy 86.8, refcoco+:testA accuracy 91.7, refcoco+:testB accuracy 82.2,
        refcocog:val accuracy 89.8, refcocog:test accuracy 82.2, refcoco-res:val mIoU 78.0, vqav2:test-dev
        accuracy 79.7, textvqa:test-dev accuracy 63.6, vizwiz:test-dev accuracy 63.6
    """,
    "large-ft": """
        coco-caption:test CIDEr 143.3, nocaps:val CIDEr 124.9, textcaps:val CIDEr 151.1, coco-detection:val2017
        mAP 43.4, flickr30k:test R@1 85.2, refcoco:val accuracy 93.4, refcoco:testA accuracy 95.3, refcoco:testB
        accuracy 92.0, refcoco+:val accuracy 88.3, refcoco+:testA accuracy 92.9, refcoco+:testB accuracy 83.6,
        refcocog:val accuracy 91.2, refcocog:test accuracy 91.7, refcoco-res:val mIoU 80.5, vqav2:test-dev
        accuracy 81.7, textvqa:test-dev accuracy 73.5, vizwiz:test-dev accuracy 72.6
    """,
}


def card(model: str) -> dict[tuple[str, str, str], float]:
    rows = [row.split() for row in CARD[model].split(",")]
    return {(*place.split(":"), metric): float(value) for place, metric, value in rows}


def test_all_62() -> None:
    for model in MODELS:
        assert published_results(model) == card(model)
    assert sum(len(published_results(model)) for model in MODELS) == 62
    assert "2311.06242" in published_source()


def test_every_table_has_one() -> None:
    assert {split.partition(":")[0] for split in published_splits()} == set(TABLES)


def test_names() -> None:
    assert [published_name(name) for name in ("base", "microsoft/Florence-2-large-ft")] == ["base", "large-ft"]
    assert [published_name(name) for name in ("nano", "folder/base", "microsoft/Florence-2")] == [None] * 3
    assert "December 2024" in (published_note("large") or "")
    assert published_note("base") is None
