"""Bootstrap intervals."""

import pytest

from florence2.evaluate.intervals import bootstrap


def test_about_two_standard_errors() -> None:
    low, high = bootstrap([1, 0] * 200, list(range(400))) or (0, 0)
    assert low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)


def test_examples_of_one_image_are_drawn_together() -> None:
    """Twenty images with forty equal examples each vary as twenty examples do."""
    shares = [float(image % 2) for image in range(20) for _ in range(40)]
    images = [image for image in range(20) for _ in range(40)]
    low, high = bootstrap(shares, images) or (0, 0)
    alone = bootstrap([float(image % 2) for image in range(20)], list(range(20)))
    assert (low, high) == alone
    assert high - low > 0.35


def test_shares_of_wholes() -> None:
    assert bootstrap([1] * 10, list(range(10)), [4] * 10) == (0.25, 0.25)
    assert bootstrap([0] * 10, list(range(10)), [0] * 10) == (0, 0)


def test_few_images() -> None:
    assert bootstrap([1] * 90, [i % 9 for i in range(90)]) is None


def test_samples_are_the_same_each_time() -> None:
    shares, images = [float(i % 3 == 0) * i for i in range(40)], list(range(40))
    assert bootstrap(shares, images) == bootstrap(shares, images, seed=0) != bootstrap(shares, images, seed=1)
