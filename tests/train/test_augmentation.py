"""Images vary, and locations follow them: what is under a box before is under it afterwards."""

from collections.abc import Sequence
from itertools import starmap

import numpy as np
import pytest
from PIL import Image, ImageDraw

from florence2.errors import ConfigError, ImageError
from florence2.inputs.coordinates import LOCATION, bins_to_tokens, pixels_to_bins
from florence2.inputs.tasks import TaskTable, token_task
from florence2.processor import Processor
from florence2.train.augmentation import augment, can_flip
from florence2.train.data import StepData
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings

RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (90, 90, 90)
SIZE = (200, 100)
BOXES = {RED: (20, 10, 60, 50), BLUE: (150, 30, 180, 90)}
QUAD = (20, 10, 60, 10, 60, 50, 20, 50)


def drawn() -> Image.Image:
    image = Image.new("RGB", SIZE, GREY)
    for colour, box in BOXES.items():
        ImageDraw.Draw(image).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=colour)
    return image


def tokens(pixels: Sequence[int]) -> str:
    return bins_to_tokens(pixels_to_bins(pixels, SIZE))


def found(image: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Return the box of the pixels that are nearly of a colour."""
    near = (np.abs(np.asarray(image).astype(int) - colour) < 60).all(axis=2)
    rows, columns = np.flatnonzero(near.any(axis=1)), np.flatnonzero(near.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def in_pixels(text: str) -> np.ndarray:
    bins: np.ndarray = np.array([int(bin) for bin in LOCATION.findall(text)]).reshape(-1, 2)
    pixels: np.ndarray = bins * np.array(SIZE) / 1000
    return pixels


OD = Sample(drawn(), (("<OD>", f"red{tokens(BOXES[RED])}blue{tokens(BOXES[BLUE])}"),))
REGION = Sample(drawn(), ((f"<REGION_TO_CATEGORY>{tokens(BOXES[RED])}", "red thing"),))
OUTLINE = Sample(drawn(), (("<REFERRING_EXPRESSION_SEGMENTATION>red thing", tokens(QUAD)),))
INSTANCES = Sample(drawn(), (("<OPEN_VOCABULARY_DETECTION>red", f"red<poly>{tokens(QUAD)}</poly>"),))
READING = Sample(drawn(), (("<OCR_WITH_REGION>", f"EXIT{tokens(QUAD)}"),))


@pytest.mark.parametrize("settings", [{"flip": 1.0}, {"shrink": 0.4}, {"flip": 1.0, "shrink": 0.4}])
def test_boxes_follow(settings: dict[str, float], processor: Processor) -> None:
    for index in range(20):
        shown = augment(OD, processor, TrainSettings(**settings), 0, index)
        assert isinstance(shown.image, Image.Image) and shown.image.size == SIZE
        corners = in_pixels(shown.pairs[0][1]).reshape(-1, 4)
        expected = np.array([found(shown.image, colour) for colour in BOXES])
        assert np.abs(corners - expected).max() <= 1.5
        assert shown.pairs[0][1].startswith("red<loc_") and corners[0][0] < corners[0][2]


def test_a_mirrored_box_is_exact(processor: Processor) -> None:
    shown = augment(OD, processor, TrainSettings(flip=1.0), 0, 0)
    left, top, right, bottom = pixels_to_bins(BOXES[RED], SIZE)
    assert shown.pairs[0][1].startswith(f"red{bins_to_tokens((999 - right, top, 999 - left, bottom))}blue")
    assert augment(shown, processor, TrainSettings(flip=1.0), 0, 0).pairs == OD.pairs


def test_the_region_of_a_prompt_follows(processor: Processor) -> None:
    shown = augment(REGION, processor, TrainSettings(flip=1.0, shrink=0.5), 0, 0)
    assert isinstance(shown.image, Image.Image)
    assert np.abs(in_pixels(shown.pairs[0][0]).ravel() - found(shown.image, RED)).max() <= 1.5
    assert shown.pairs[0][1] == "red thing"


@pytest.mark.parametrize("sample", [OUTLINE, INSTANCES])
def test_outlines_keep_their_sense_of_rotation(sample: Sample, processor: Processor) -> None:
    def area(text: str) -> float:
        points = in_pixels(text)
        after = np.roll(points, -1, axis=0)
        return float((points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum() / 2)

    shown = augment(sample, processor, TrainSettings(flip=1.0), 0, 0)
    assert isinstance(shown.image, Image.Image)
    points = in_pixels(shown.pairs[0][1])
    assert np.abs(np.array([*points.min(axis=0), *points.max(axis=0)]) - found(shown.image, RED)).max() <= 1.5
    assert area(shown.pairs[0][1]) == pytest.approx(area(sample.pairs[0][1])) and area(sample.pairs[0][1]) > 0


def test_quads_shrink_and_are_not_mirrored(processor: Processor) -> None:
    assert augment(READING, processor, TrainSettings(flip=1.0), 0, 0).pairs == READING.pairs
    shown = augment(READING, processor, TrainSettings(flip=1.0, shrink=0.5), 0, 0)
    assert isinstance(shown.image, Image.Image)
    points = in_pixels(shown.pairs[0][1])
    assert np.abs(np.array([*points[0], *points[2]]) - found(shown.image, RED)).max() <= 1.5


@pytest.mark.parametrize(
    ("pair", "flips"),
    [
        (("<OD>", "cup<loc_1><loc_2><loc_3><loc_4>"), True),
        (("<CAPTION>", "A cup on a table."), True),
        (("<CAPTION>", "A cup on the left."), False),
        (("<CAPTION_TO_PHRASE_GROUNDING>the leftmost cup", "cup<loc_1><loc_2><loc_3><loc_4>"), False),
        (("<CAPTION>", "A right-handed person."), False),
        (("<CAPTION>", "A bright cup."), True),
        (("<OCR>", "EXIT"), False),
        (("<REGION_TO_OCR><loc_1><loc_2><loc_3><loc_4>", "EXIT"), False),
        (("<OCR_WITH_REGION>", "EXIT" + "<loc_1>" * 8), False),
        (("Which side is the cup on?", "the near one"), False),
        (("<VQA>Which side?", "the near one"), False),
        (("<CUPS>", "cup<loc_1><loc_2><loc_3><loc_4>"), True),
    ],
)
def test_where_a_mirror_would_lie(pair: tuple[str, str], flips: bool) -> None:
    tasks = TaskTable([token_task("<VQA>"), token_task("<CUPS>", "boxes")])
    assert can_flip(Sample(drawn(), (pair,)), tasks) == flips
    assert not can_flip(Sample(drawn(), (pair, ("<OCR>", "EXIT"))), tasks)


def test_draws_depend_on_seed_epoch_and_sample(processor: Processor) -> None:
    def values(seed: int, epoch: int, index: int) -> bytes:
        settings = TrainSettings(seed=seed, shrink=0.5, colour=0.5)
        image = augment(OD, processor, settings, epoch, index).image
        assert isinstance(image, Image.Image)
        return image.tobytes()

    places = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    first = list(starmap(values, places))
    assert len(set(first)) == 4 and first == list(starmap(values, places))


def test_colours_change_and_boxes_do_not(processor: Processor) -> None:
    shown = augment(OD, processor, TrainSettings(colour=0.3), 0, 1)
    assert isinstance(shown.image, Image.Image) and isinstance(OD.image, Image.Image)
    assert shown.pairs == OD.pairs and shown.image.tobytes() != OD.image.tobytes()


def test_a_run_shows_each_epoch_otherwise(processor: Processor) -> None:
    data = StepData([OD], processor, TrainSettings(steps=2, batch=1, shrink=0.3), 50)
    first, second, again = data[0][0], data[1][0], data[0][0]
    assert not first.pixel_values.equal(second.pixel_values) and not first.labels.equal(second.labels)
    assert first.pixel_values.equal(again.pixel_values) and first.labels.equal(again.labels)


def test_an_image_that_cannot_be_read_is_named(processor: Processor) -> None:
    data = StepData([Sample(b"nothing", (("<OD>", ""),), "a.png")], processor, TrainSettings(batch=1, colour=0.1), 50)
    with pytest.raises(ImageError, match="^a.png: "):
        data[0]


@pytest.mark.parametrize("values", [{"flip": 1.1}, {"flip": -0.1}, {"shrink": 0.0}, {"shrink": 1.5}, {"colour": 2.0}])
def test_values_out_of_range(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(values))} is .*; it must be from 0[.1]* to 1"):
        TrainSettings(**values)
