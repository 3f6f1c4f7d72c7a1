"""Encoded images stay while they fit, and the ones that were not used for longest leave first."""

import torch
from torch import Tensor

from florence2.generation.engine.features import FeatureCache

IMAGE = torch.zeros(1, 5, 5)  # 100 bytes


def keep(cache: FeatureCache[Tensor], key: str, features: Tensor) -> None:
    cache.put(key, features, features.nbytes)


def test_the_longest_unused_leave_first() -> None:
    cache: FeatureCache[Tensor] = FeatureCache(250)
    keep(cache, "a", IMAGE)
    keep(cache, "b", IMAGE + 1)
    assert cache.get("a") is IMAGE
    keep(cache, "c", IMAGE)
    assert (len(cache), cache.bytes) == (2, 200)
    assert cache.get("b") is None and cache.get("a") is not None and cache.get("c") is not None


def test_an_image_above_the_limit_is_not_kept() -> None:
    cache: FeatureCache[Tensor] = FeatureCache(99)
    keep(cache, "a", IMAGE)
    assert cache.get("a") is None and cache.bytes == 0


def test_an_image_counts_once() -> None:
    cache: FeatureCache[Tensor] = FeatureCache(250)
    for _ in range(3):
        keep(cache, "a", IMAGE)
    assert (len(cache), cache.bytes) == (1, 100)


def test_half_types_take_half() -> None:
    cache: FeatureCache[Tensor] = FeatureCache(100)
    keep(cache, "a", IMAGE.half())
    keep(cache, "b", IMAGE.half())
    assert (len(cache), cache.bytes) == (2, 100)
