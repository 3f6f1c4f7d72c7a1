"""Encoded images stay while they fit, and the ones that were not used for longest leave first."""

import torch

from florence2.generation.engine.features import FeatureCache

IMAGE = torch.zeros(1, 5, 5)  # 100 bytes


def test_the_longest_unused_leave_first() -> None:
    cache = FeatureCache(250)
    cache.put("a", IMAGE)
    cache.put("b", IMAGE + 1)
    assert cache.get("a") is IMAGE
    cache.put("c", IMAGE)
    assert (len(cache), cache.bytes) == (2, 200)
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None


def test_an_image_above_the_limit_is_not_kept() -> None:
    cache = FeatureCache(99)
    cache.put("a", IMAGE)
    assert cache.get("a") is None and cache.bytes == 0


def test_an_image_counts_once() -> None:
    cache = FeatureCache(250)
    for _ in range(3):
        cache.put("a", IMAGE)
    assert (len(cache), cache.bytes) == (1, 100)


def test_half_types_take_half() -> None:
    cache = FeatureCache(100)
    cache.put("a", IMAGE.half())
    cache.put("b", IMAGE.half())
    assert (len(cache), cache.bytes) == (2, 100)
