"""Files of training data -> samples, with everything that is wrong in one error."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from florence2.errors import Florence2Error
from florence2.inputs.image import open_image
from florence2.train.entries import DataError
from florence2.train.images import ImageFolder, upright_size
from florence2.train.samples import Sample
from florence2.train.sources import MAX_BYTES, read_samples

ORIENTATION = 0x0112


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images: a.jpg of 500 x 200 pixels, where a bin is 0.5 by 0.2, and b.png of 100 x 100."""
    Image.new("RGB", (500, 200), "teal").save(tmp_path / "a.jpg")
    Image.new("RGB", (100, 100), "teal").save(tmp_path / "b.png")
    return tmp_path


def write_lines(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_one(folder: Path, **row: Any) -> tuple[str, str]:
    """The pair that one line about a.jpg becomes."""
    (sample,) = read_samples(write_lines(folder / "one.jsonl", [{"image": "a.jpg", **row}]))
    (pair,) = sample.pairs
    return pair


# ---- JSON Lines -----------------------------------------------------------------------------------------------------


def test_lines_of_a_image_share_samples(folder: Path) -> None:
    rows = [
        {"image": name, "prefix": "<CAPTION>", "suffix": text} for name, text in zip("abaaab", "uvwxyz", strict=True)
    ]
    for row in rows:
        row["image"] += ".jpg" if row["image"] == "a" else ".png"
    samples = read_samples(write_lines(folder / "x.jsonl", rows), questions_per_image=3)
    assert [[suffix for _, suffix in sample.pairs] for sample in samples] == [["u", "w", "x"], ["y"], ["v", "z"]]
    assert [Path(str(sample.image)) for sample in samples] == [folder / name for name in ("a.jpg", "a.jpg", "b.png")]
    assert samples[0].name == "a.jpg (line 1, line 3, line 4)"


def test_nothing_to_be_found_is_an_answer(folder: Path) -> None:
    asked = (("<OD>", "boxes"), ("<OPEN_VOCABULARY_DETECTION>a cup", "boxes"), ("<OCR_WITH_REGION>", "quads"))
    rows = [{"image": "a.jpg", "prefix": prefix, key: []} for prefix, key in asked]
    samples = read_samples(write_lines(folder / "x.jsonl", rows))
    assert [pair for sample in samples for pair in sample.pairs] == [(prefix, "") for prefix, _ in asked]


def test_images_may_be_elsewhere_and_lines_empty(folder: Path) -> None:
    (folder / "labels").mkdir()
    row = json.dumps({"image": "b.png", "prefix": "<OCR>", "suffix": "Zürich 東京", "id": 7, "boxes": None})
    path = folder / "labels" / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + row.encode() + b"\r\n\r\n  \n")
    assert read_samples(path, images=folder) == [
        Sample(folder / "b.png", (("<OCR>", "Zürich 東京"),), "b.png (line 1)")
    ]


def test_boxes_in_pixels(folder: Path) -> None:
    """500 x 200 pixels: x 100 is bin 200, 250 is 500; y 50 is bin 250, and 200, the border, is the last."""
    boxes = [{"label": " cup ", "box": [100, 50, 250, 200]}, {"label": "cup", "box": [-3, 0.1, 499.9, 0.3]}]
    cup = "cup<loc_200><loc_250><loc_500><loc_999>"
    assert read_one(folder, prefix="<OD>", boxes=boxes) == ("<OD>", cup + "cup<loc_0><loc_0><loc_999><loc_1>")
    bare = [{"box": [100, 50, 250, 200]}]
    assert read_one(folder, prefix="<REGION_PROPOSAL>", boxes=bare)[1] == cup.removeprefix("cup")
    assert read_one(folder, prefix="<OPEN_VOCABULARY_DETECTION>cup", boxes=boxes[:1])[1] == cup


def test_quads_and_outlines_in_pixels(folder: Path) -> None:
    quads = [{"label": "EXIT", "quad": [5, 4, 60, 4, 60, 30, 5, 30]}]
    tokens = "".join(f"<loc_{bin}>" for bin in (10, 20, 120, 20, 120, 150, 10, 150))
    assert read_one(folder, prefix="<OCR_WITH_REGION>", quads=quads)[1] == f"EXIT{tokens}"
    rings = [[5, 4, 60, 4, 60, 30], [0, 0, 5, 4, 0, 4]]
    asked = read_one(folder, prefix="region_to_segmentation", region=[5, 4, 60, 30], polygons=rings)
    assert asked[0] == "<REGION_TO_SEGMENTATION><loc_10><loc_20><loc_120><loc_150>"
    first, second = ("".join(f"<loc_{b}>" for b in row) for row in ((10, 20, 120, 20, 120, 150), (0, 0, 10, 20, 0, 20)))
    assert asked[1] == f"{first}<sep>{second}"


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_sizes_are_those_of_the_upright_image(tmp_path: Path, kind: str) -> None:
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        path = tmp_path / f"{orientation}.{kind}"
        Image.new("RGB", (40, 20), "red").save(path, exif=exif)
        assert upright_size(path) == open_image(path).size
        assert upright_size(path) == ((40, 20) if orientation < 5 else (20, 40))


def test_boxes_belong_to_the_upright_image(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.new("RGB", (200, 500), "red").save(tmp_path / "a.jpg", exif=exif)
    pair = read_one(tmp_path, prefix="<OD>", boxes=[{"label": "cup", "box": [400, 50, 450, 100]}])
    assert pair[1] == "cup<loc_800><loc_250><loc_900><loc_500>"


GOOD = {"image": "a.jpg", "prefix": "<CAPTION>", "suffix": "a cup"}
DETECT = {"image": "a.jpg", "prefix": "<OD>"}
WRONG_LINES: list[tuple[Any, str]] = [
    ("{", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ('"é"'.encode("latin-1"), "is not JSON"),
    ([1], r"one JSON object, not \[1\]"),
    ({}, "'image' is missing"),
    ({**GOOD, "image": 5}, "image is 5; it must be a text"),
    ({**GOOD, "image": "c.jpg"}, "'c.jpg' is not in"),
    ({**GOOD, "image": ""}, "'' is not in"),
    ({**GOOD, "image": "x" * 5000}, "is not in"),
    ({**GOOD, "image": "a\0.jpg"}, "is not in"),
    ({**GOOD, "image": "\ud800"}, "is not in"),
    ({**GOOD, "prefix": None}, "'prefix' is missing"),
    ({**GOOD, "prefix": " "}, "must be a token"),
    ({**GOOD, "prefix": "<VQA>how many?"}, "Unknown task <VQA>"),
    ({**GOOD, "prefix": "<CAPTION>a cup"}, "takes no input"),
    ({**GOOD, "prefix": "<CAPTION_TO_PHRASE_GROUNDING>"}, "needs a text"),
    ({**GOOD, "prefix": "<REGION_TO_CATEGORY>"}, "needs a region"),
    ({**GOOD, "prefix": "<REGION_TO_CATEGORY><loc_1><loc_2><loc_3><loc_1000>"}, "needs a region"),
    ({**GOOD, "prefix": "where is <loc_1000>?"}, "prefix holds '<loc_1000>'"),
    ({**GOOD, "suffix": "cup<loc_1><loc_2><loc_999><loc_1000>"}, "suffix holds '<loc_1000>'"),
    ({**GOOD, "suffix": f"cup<loc_{'[' * 5000}>"}, r"suffix holds '<loc_\[{40,60}\.\.\.; location"),
    ({**GOOD, "suffix": "cup<loc_007>"}, "suffix holds '<loc_007>'"),
    ({**GOOD, "suffix": "cup<LOC_7>"}, "suffix holds '<LOC_7>'"),
    ({**GOOD, "suffix": "cup<loc_-7>"}, "suffix holds '<loc_-7>'"),
    ({**GOOD, "suffix": "cup<loc_7"}, "suffix holds '<loc_7'"),
    ({**GOOD, "suffix": "\ud83d"}, "half a character"),
    ({**GOOD, "suffix": " \n"}, "is empty"),
    ({**GOOD, "suffix": 3}, "suffix is 3"),
    ({**GOOD, "boxes": []}, "suffix and boxes are given"),
    (DETECT, "none is given"),
    ({**DETECT, "boxes": {}}, r"boxes is \{\}; it must be a list\."),
    ({"image": "a.jpg", "prefix": "<REGION_TO_SEGMENTATION>", "region": [1, 2, 3, 4], "polygons": []}, "of outlines"),
    ({**DETECT, "boxes": ["cup"]}, "must be an object with 'box' and label"),
    ({**DETECT, "boxes": [{"box": [1, 2, 3, 4]}]}, "'label' is missing"),
    ({**DETECT, "boxes": [{"label": " ", "box": [1, 2, 3, 4]}]}, "is empty"),
    ({**DETECT, "boxes": [{"label": "a<b", "box": [1, 2, 3, 4]}]}, "leave out '<'"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [3, 2, 1, 4]}]}, "x1 <= x2"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [1, 2, 3, 4, 5, 6]}]}, "must be x1, y1, x2, y2"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [1, 2, 3]}]}, "pairs"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [1, 2, "3", 4]}]}, "list of numbers"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [1, 2, True, 4]}]}, "list of numbers"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [1, 2, float("nan"), 4]}]}, "list of numbers"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [1, 2, 10**400, 4]}]}, "list of numbers"),
    ({**DETECT, "boxes": [{"label": "cup", "box": 5}]}, "list of numbers"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [0.1, 0.2, 0.6, 1]}]}, "fractions"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [500, 2, 600, 4]}]}, "outside the image of 500 x 200"),
    ({**DETECT, "boxes": [{"label": "cup", "box": [1, -9, 2, -4]}]}, "outside"),
    (
        {**DETECT, "boxes": [{"label": "cup", "box": [10, 10, 90, 999]}]},
        "far beyond the image of 500 x 200 pixels; .* bins",
    ),
    ({**DETECT, "boxes": [{"label": "cup", "box": [-501, 10, 90, 99]}]}, "far beyond"),
    ({**DETECT, "quads": [{"label": "cup", "quad": [1, 2, 3, 4, 5, 6, 7, 8]}]}, "cannot answer '<OD>'"),
    ({**GOOD, "suffix": None, "boxes": [{"label": "cup", "box": [1, 2, 3, 4]}]}, "cannot answer '<CAPTION>'"),
    (
        {"image": "a.jpg", "prefix": "<REGION_PROPOSAL>", "boxes": [{"label": "cup", "box": [1, 2, 3, 4]}]},
        "does not belong there",
    ),
    ({"image": "a.jpg", "prefix": "<OCR_WITH_REGION>", "quads": [{"label": "A", "quad": [1, 2, 3, 4]}]}, "4 numbers"),
    ({**GOOD, "prefix": "<REGION_TO_CATEGORY>", "region": [5, 5, 2, 2]}, "x1 <= x2"),
    ({**GOOD, "prefix": "<REGION_TO_CATEGORY>", "region": [5, 5]}, "four numbers"),
    ({**GOOD, "region": [1, 2, 3, 4]}, "takes no input"),
    (
        {"image": "a.jpg", "prefix": "<REFERRING_EXPRESSION_SEGMENTATION>a cup", "polygons": [[1, 2, 3, 4]]},
        "three points",
    ),
]


@pytest.mark.parametrize(("row", "words"), WRONG_LINES, ids=[words for _, words in WRONG_LINES])
def test_a_wrong_line_is_named(folder: Path, row: Any, words: str) -> None:
    path = folder / "x.jsonl"
    text = row if isinstance(row, bytes) else row.encode() if isinstance(row, str) else json.dumps(row).encode()
    path.write_bytes(json.dumps(GOOD).encode() + b"\n" + text + b"\n")
    with pytest.raises(DataError, match=f"1 problem:\n  line 2: .*{words}"):
        read_samples(path)


def test_all_that_is_wrong_is_told_at_once(folder: Path) -> None:
    path = write_lines(folder / "x.jsonl", [{}, GOOD, {**GOOD, "suffix": ""}, {**GOOD, "image": "c"}])
    with pytest.raises(DataError) as raised:
        read_samples(path)
    assert [line.split(":")[0].strip() for line in str(raised.value).splitlines()[1:]] == ["line 1", "line 3", "line 4"]
    write_lines(path, [GOOD, *[{}] * 1234])
    with pytest.raises(DataError, match="1,234 problems, the first 20") as raised:
        read_samples(path)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()[1:]] == [f"  line {n}" for n in range(2, 22)]


def test_a_broken_image_is_named_where_its_size_is_needed(folder: Path) -> None:
    (folder / "a.jpg").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"line 1: .*a\.jpg is not an image"):
        read_one(folder, prefix="<OD>", boxes=[{"label": "cup", "box": [1, 2, 3, 4]}])


def test_words_that_look_like_locations_are_words(folder: Path) -> None:
    assert read_one(folder, prefix="<OCR>", suffix="<locale> <local>")[1] == "<locale> <local>"


# ---- COCO -----------------------------------------------------------------------------------------------------------

IMAGES = [
    {"id": 4, "file_name": "a.jpg", "width": 500, "height": 200},
    {"id": 2, "file_name": "b.png"},
    {"id": 9, "file_name": "nothing is asked about it.jpg"},
]
CATEGORIES = [{"id": 1, "name": "cup"}, {"id": 3, "name": "spoon"}]
RING = [10, 10, 20, 10, 20, 30]
CUP = {"id": 70, "image_id": 4, "category_id": 1, "bbox": [100, 50, 150, 100], "segmentation": [RING, RING]}
SPOON = {"id": 71, "image_id": 4, "category_id": 3, "bbox": [50, 100, 25, 60], "segmentation": [RING]}
CROWD = {"id": 72, "image_id": 4, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1, "segmentation": {"counts": []}}
OTHER = {"id": 73, "image_id": 2, "category_id": 1, "bbox": [50, 40, 0, 100], "segmentation": [RING]}
CUP_TOKENS, SPOON_TOKENS = "<loc_200><loc_250><loc_500><loc_750>", "<loc_100><loc_500><loc_150><loc_800>"


def write_coco(folder: Path, annotations: Sequence[Any], **changes: Any) -> Path:
    values = {"images": IMAGES, "annotations": annotations, "categories": CATEGORIES, **changes}
    (folder / "coco.json").write_text(json.dumps(values))
    return folder / "coco.json"


def test_coco_boxes_from_left_to_right(folder: Path) -> None:
    samples = read_samples(write_coco(folder, [CUP, OTHER, SPOON, CROWD]))
    assert [sample.pairs for sample in samples] == [
        (("<OD>", f"spoon{SPOON_TOKENS}cup{CUP_TOKENS}"),),
        (("<OD>", "cup<loc_500><loc_400><loc_500><loc_999>"),),
    ]
    assert [sample.name for sample in samples] == ["a.jpg (annotation 70 and 1 more)", "b.png (annotation 73)"]


def test_coco_regions(folder: Path) -> None:
    ring = "<loc_20><loc_50><loc_40><loc_50><loc_40><loc_150>"
    path = write_coco(folder, [CUP, SPOON])
    samples = read_samples(path, tasks=["<REGION_TO_CATEGORY>", "<REGION_TO_SEGMENTATION>"], questions_per_image=3)
    assert [sample.pairs for sample in samples] == [
        (
            (f"<REGION_TO_CATEGORY>{CUP_TOKENS}", "cup"),
            (f"<REGION_TO_CATEGORY>{SPOON_TOKENS}", "spoon"),
            (f"<REGION_TO_SEGMENTATION>{CUP_TOKENS}", f"{ring}<sep>{ring}"),
        ),
        ((f"<REGION_TO_SEGMENTATION>{SPOON_TOKENS}", ring),),
    ]


def test_coco_captions(folder: Path) -> None:
    rows = [{"id": n, "image_id": 4, "caption": text} for n, text in enumerate(("A cup.", " A spoon. "))]
    (sample,) = read_samples(write_coco(folder, rows))
    assert sample.pairs == (("<CAPTION>", "A cup."), ("<CAPTION>", "A spoon."))
    (sample,) = read_samples(write_coco(folder, rows[:1]), tasks=["<DETAILED_CAPTION>"])
    assert sample.pairs == (("<DETAILED_CAPTION>", "A cup."),)
    with pytest.raises(DataError, match="annotation 9: caption is empty"):
        read_samples(write_coco(folder, [{"id": 9, "image_id": 4, "caption": " "}]))
    with pytest.raises(DataError, match="'<OD>' cannot be asked with this file; choose from <CAPTION>"):
        read_samples(write_coco(folder, rows), tasks=["<OD>"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_id": 5}, "annotation 70: .*no image"),
        ({"image_id": "4"}, "annotation 70: .*no image"),
        ({"category_id": 2}, "annotation 70: category_id is 2"),
        ({"category_id": [1]}, "annotation 70: category_id"),
        ({"bbox": None}, "annotation 70: coordinates must be a list of numbers"),
        ({"bbox": [1, 2, 3]}, "annotation 70: bbox"),
        ({"bbox": [5, 5, -1, 3]}, "annotation 70: bbox"),
        ({"bbox": [500, 5, 1, 3]}, "annotation 70: .*outside"),
        ({"segmentation": {"counts": [1], "size": [2, 2]}}, "annotation 70: segmentation"),
        ({"segmentation": [[1, 2, 3, 4]]}, "annotation 70: .*three points"),
        ({"segmentation": [5]}, "annotation 70: coordinates"),
        ({"segmentation": []}, r"annotation 70: segmentation is \[\]; it must be a list of polygons"),
    ],
)
def test_a_wrong_annotation_is_named(folder: Path, change: dict[str, Any], words: str) -> None:
    path = write_coco(folder, [{**CUP, **change}, SPOON])
    with pytest.raises(DataError, match=f"1 problem:\n  {words}"):
        read_samples(path, tasks=["<REGION_TO_SEGMENTATION>"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"images": [{"id": 4, "file_name": "a.jpg", "width": 200, "height": 500}]}, "500 x 200 pixels upright, but"),
        ({"images": [{"id": 4, "file_name": "c.jpg"}]}, "image 4: the image 'c.jpg'"),
        ({"images": [IMAGES[0], {"id": 4, "file_name": "b.png"}]}, r"images\[1\]: the id 4 is used twice"),
        ({"images": [IMAGES[0], {"file_name": "b.png"}]}, r"images\[1\]: must be an object"),
        ({"images": [IMAGES[0], 5]}, r"images\[1\]: must be an object"),
        ({"categories": [{"id": 1, "name": 5}]}, "annotation 70: name is 5"),
        ({"categories": [{"id": 1, "name": " "}]}, "annotation 70: the name of category 1 is empty"),
        ({"categories": [{"id": 1, "name": "<cup>"}]}, "annotation 70: .*leave out '<'"),
        ({"categories": None}, "annotation 70: category_id is 1"),
        ({"annotations": [CUP, 5]}, r"annotations\[1\]: 5 belongs to no image"),
        ({"images": None}, "no list of images"),
        ({"annotations": {}}, "no list of annotations"),
        ({"annotations": []}, "has no questions"),
    ],
)
def test_a_wrong_coco_file_is_told(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        read_samples(write_coco(folder, **{"annotations": [CUP], **changes}))


# ---- which file -----------------------------------------------------------------------------------------------------


def test_the_lines_of_a_folder(folder: Path) -> None:
    with pytest.raises(DataError, match="has 0 .jsonl files"):
        read_samples(folder)
    write_lines(folder / "x.jsonl", [GOOD])
    assert read_samples(folder)[0].pairs == (("<CAPTION>", "a cup"),)
    write_lines(folder / "y.jsonl", [GOOD])
    with pytest.raises(DataError, match="has 2 .jsonl files"):
        read_samples(folder)
    write_lines(folder / "train.jsonl", [{**GOOD, "suffix": "a spoon"}])
    assert read_samples(folder)[0].pairs == (("<CAPTION>", "a spoon"),)


def test_files_that_are_none(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    (folder / "list.json").write_text("[1]")
    (folder / "broken.json").write_text("{")
    with (folder / "large.jsonl").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    for name, words in {
        "a.jpg": "is not training data",
        "absent.jsonl": "does not exist",
        "empty.jsonl": "has no questions",
        "list.json": "no list of images",
        "broken.json": "cannot be read as JSON",
        "large.jsonl": "above the limit of 1,073,741,824",
    }.items():
        with pytest.raises(DataError, match=words):
            read_samples(folder / name)


def test_settings_that_mean_nothing(folder: Path) -> None:
    path = write_lines(folder / "x.jsonl", [GOOD])
    with pytest.raises(DataError, match="questions_per_image is 0"):
        read_samples(path, questions_per_image=0)
    with pytest.raises(DataError, match="for COCO files only"):
        read_samples(path, tasks=["<CAPTION>"])
    with pytest.raises(DataError, match="is not a folder"):
        read_samples(path, images=folder / "nowhere")
    assert issubclass(DataError, Florence2Error)


def test_an_image_is_measured_once(folder: Path) -> None:
    images = ImageFolder(folder)
    path = images.find("a.jpg")
    assert images.size(path) == (500, 200)
    path.unlink()
    assert images.find("a.jpg") == path
    assert images.size(path) == (500, 200)
