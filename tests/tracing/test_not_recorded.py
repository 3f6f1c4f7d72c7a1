"""Warnings about traces and patches whose names no run of their block recorded."""

from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from florence2 import EncodedImage, Florence2, GenerationOptions
from florence2.errors import OptionError
from florence2.tracing.patches import scale, zero
from florence2.tracing.selection import NotRecordedWarning


@pytest.fixture(scope="module")
def encoded(small: Florence2, images: list[Image.Image]) -> list[EncodedImage]:
    return [small.encode_image(image) for image in images]


def test_a_trace_that_keeps_nothing_says_so(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions
) -> None:
    """Each pattern counts; a block without a run, or left by an exception, does not warn."""
    encoded = small.encode_image(images[0])
    kept_nothing = pytest.warns(NotRecordedWarning, match="The trace of 'vision_tower' keeps nothing")
    with kept_nothing as warned, small.trace("memory", "vision_tower", "scores"):
        small.run("<OD>", encoded, options=beams)
    assert len(warned) == 1 and warned[0].filename == __file__
    with small.trace("vision_tower"):
        pass
    with pytest.raises(ZeroDivisionError), small.trace("vision_tower"):
        small.run("<OD>", encoded, options=beams)
        raise ZeroDivisionError


def test_a_replaced_module_that_records_nothing(
    small: Florence2, images: list[Image.Image], beams: GenerationOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its names are missing from the run, and the message says that this is one of two reasons."""

    class Silent(torch.nn.Module):
        def forward(self, x: Tensor, trace: Any = None) -> Tensor:
            return x

    block = small.model.vision_tower.blocks[0][0]
    monkeypatch.setitem(block._modules, "spatial_block", Silent())
    name = "vision_tower.blocks.0.0.spatial_block.conv1"
    replaced = "a module was replaced by one that does not record it"
    with pytest.warns(NotRecordedWarning, match=replaced), small.trace(f"={name}") as t:
        small.run("<OD>", images[0], options=beams)
    with pytest.raises(OptionError, match=f"'{name}' was not recorded in this run: .* or its module was replaced"):
        t[name]


def test_a_patch_that_never_acts_says_so(
    small: Florence2, images: list[Image.Image], encoded: list[EncodedImage], beams: GenerationOptions
) -> None:
    """An encoded image has passed the vision tower, and a pattern is fine when any of its names occurs."""
    unused = "The patch of 'vision_tower', 'scores.repetition_penalty' changed nothing: no run in its block recorded"
    patches = {"vision_tower": zero(), "memory": scale(1.0), "scores*": scale(1.0), "scores.repetition_penalty": zero()}
    with pytest.warns(NotRecordedWarning, match=unused) as warned, small.patched(patches):
        small.run("<OD>", encoded[0], options=beams)
    assert len(warned) == 1 and warned[0].filename == __file__
    with small.patched({"vision_tower": scale(1.0)}):  # which acts here, although not in every run
        small.run("<OD>", encoded[0], options=beams)
        small.run("<OD>", images[0], options=beams)


def test_a_block_that_did_not_get_to_run_says_nothing(small: Florence2) -> None:
    block = small.patched({"vision_tower": zero()})
    with block:
        pass
    with pytest.raises(ZeroDivisionError), block:
        small.run("<OD>", small.encode_image(Image.new("RGB", (8, 8))), options=small.options(max_new_tokens=1))
        raise ZeroDivisionError


def test_each_entry_of_a_block_counts_for_itself(
    small: Florence2, images: list[Image.Image], encoded: list[EncodedImage], beams: GenerationOptions
) -> None:
    block = small.patched({"vision_tower": scale(1.0)})
    with block:
        small.encode_image(images[0])
        with pytest.warns(NotRecordedWarning, match="'vision_tower' changed nothing"), block:
            small.run("<OD>", encoded[0], options=beams)
