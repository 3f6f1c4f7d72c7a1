"""Pillow's coefficients and its order of passes, against its description in double precision and its own results."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from florence2.fast.cuda import pillow
from florence2.fast.cuda.pillow import BITS, coefficients, pass_order
from florence2.fast.cuda.pixels import resize_axis

LENGTHS = [(1, 2), (1, 9), (2, 1), (9, 1), (2, 3), (5, 4), (31, 7), (64, 192), (457, 768), (640, 768), (1920, 768)]


def bicubic(x: float) -> float:
    """The filter as Pillow writes it, a = -0.5."""
    x = abs(x)
    if x < 1:
        return ((-0.5 + 2) * x - (-0.5 + 3)) * x * x + 1
    return (((x - 5) * x + 8) * x - 4) * -0.5 if x < 2 else 0.0


def written_out(length: int, target: int) -> np.ndarray:
    """The weights (target, length) in units of 2^-22, one after the other in doubles."""
    weights = np.zeros((target, length), np.int64)
    scale = length / target
    widened = max(scale, 1.0)
    for i in range(target):
        centre, support = (i + 0.5) * scale, 2 * widened
        start, end = max(0, int(centre - support + 0.5)), min(length, int(centre + support + 0.5))
        values = [bicubic((x - centre + 0.5) * (1 / widened)) for x in range(start, end)]
        total = 0.0
        for value in values:  # in this order; sum() rounds otherwise
            total += value
        for x, value in zip(range(start, end), values, strict=True):
            scaled = value / total * (1 << BITS)
            weights[i, x] = math.floor(scaled + 0.5) if scaled >= 0 else -math.floor(0.5 - scaled)
    return weights


def dense(taps: np.ndarray, length: int) -> np.ndarray:
    """The same matrix of what `coefficients` returns."""
    weights = np.zeros((taps.shape[2], length), np.int64)
    for places, values in zip(*taps, strict=True):
        assert (weights[np.arange(len(places)), places] == 0).all()  # no source pixel is named twice
        weights[np.arange(len(places)), places] = values
    return weights


@pytest.mark.parametrize(("length", "target"), LENGTHS)
def test_coefficients_are_those_of_doubles(length: int, target: int) -> None:
    taps = coefficients(length, target, Image.Resampling.BICUBIC)
    assert taps.dtype == np.int32
    np.testing.assert_array_equal(dense(taps, length), written_out(length, target))


@pytest.mark.parametrize("resample", list(Image.Resampling))
def test_as_few_source_pixels_as_there_are_weights(resample: int) -> None:
    support = {0: 0.5, 1: 3, 2: 1, 3: 2, 4: 0.5, 5: 1}.get(resample, 4.5)
    assert coefficients(100, 300, resample).shape[1] <= max(1, 2 * support)
    assert coefficients(300, 100, resample).shape[1] <= 6 * support + 1


def test_a_weight_of_another_rounding_is_seen() -> None:
    """By images whose sums are next to a boundary; of 300,000 random rows there are about ten for each weight."""
    noise = np.random.default_rng(3).integers(0, 256, (100_000, 13, 3), np.uint8)
    expected = np.asarray(Image.fromarray(noise).resize((6, len(noise)), Image.Resampling.BICUBIC))
    values = torch.from_numpy(noise).permute(2, 0, 1).contiguous()
    taps = torch.from_numpy(coefficients(13, 6, Image.Resampling.BICUBIC))
    right = torch.tensor(expected).permute(2, 0, 1)  # (3, rows, target)
    assert torch.equal(resize_axis(values, taps, axis=2), right)
    for column in (2, 3):
        for tap in taps[1, :, column].nonzero():
            for step in (-1, 1):
                other = taps[:, :, column : column + 1].clone()
                other[1, tap] += step
                assert not torch.equal(resize_axis(values, other, axis=2)[..., 0], right[..., column])


def test_the_order_is_that_of_this_pillow() -> None:
    order, rng = pass_order(), np.random.default_rng(8)
    assert order is not None
    for _ in range(300):
        width, height, *new = (int(side) for side in np.exp(rng.uniform(0, 6, 4)))
        seen = pillow._vertical_first((width, height), (new[0], new[1]))
        assert seen in (None, order((width, height), (new[0], new[1])))


def passes_first(is_vertical: Callable[[Any, Any], bool]) -> Callable[..., Image.Image]:
    """A Pillow that goes vertically first where `is_vertical` says so."""
    plain = Image.Image.resize

    def resize(image: Image.Image, size: tuple[int, int], resample: int) -> Image.Image:
        vertical = is_vertical(image.size, size)
        between = (image.width, size[1]) if vertical else (size[0], image.height)
        return plain(plain(image, between, resample), size, resample)

    return resize


@pytest.mark.parametrize("rule", pillow._ORDERS)
def test_the_orders_of_other_versions(rule: pillow.Order, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "resize", passes_first(rule))
    assert pass_order.__wrapped__() is rule


@pytest.mark.parametrize(
    "rule",
    [
        lambda _old, _new: True,
        lambda old, new: new[1] < old[1],
        lambda old, new: old[1] > 100 * old[0],
        lambda old, new: new[1] < old[1] and old[1] - new[1] >= 2 * (old[0] - new[0]),
    ],
)
def test_an_order_of_another_kind_is_not_taken_for_a_known_one(
    rule: pillow.Order, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "resize", passes_first(rule))
    assert pass_order.__wrapped__() is None
