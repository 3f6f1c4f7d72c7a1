"""What was recorded of a model never answers for a changed one: the changes of `tests.fast.test_changes`, by replay."""

from collections.abc import Iterator
from typing import Any

import pytest
from PIL import Image
from torch import nn

from florence2 import Florence2
from florence2.fast.cuda.recorded.graphs import record_with
from parity.tape import TapeRecorder
from tests.fast.test_changes import CHANGES, CLASSES, Parts, agree, f, image, scores, scores_uncached
from tests.release import keep

__all__ = ["f", "image"]  # fixtures
KINDS = [
    *("fc2 reversed by .data", "fc1 new parameter", "layers reordered", "heads of another number", "eps of a norm"),
    *("another activation by class", "hook on the key projection", "add_mlp of a layer", "hook in the tower"),
]
"""One change of each kind; the others are a release's."""


@pytest.fixture(autouse=True)
def recorder() -> Iterator[TapeRecorder]:
    recorder = TapeRecorder()
    with record_with(recorder):
        yield recorder


def warm(f: Florence2, image: Image.Image, recorder: TapeRecorder) -> Any:
    """Answer until every stage is replayed."""
    for _ in range(3):
        original = scores(f, image)
    assert recorder.replayed > 0
    return original


def check(f: Florence2, image: Image.Image, original: Any) -> None:
    """Compare the first answer after a change, and those that are recorded after it, with the specification."""
    answers = [scores(f, image) for _ in range(3)]
    with record_with(None):
        uncached = scores_uncached(f, image)
    assert all(agree(each, uncached) for each in answers) and not agree(uncached, original)


@pytest.mark.parametrize("change", keep(KINDS, CHANGES))
def test_changes_of_the_model(f: Florence2, image: Image.Image, change: str, recorder: TapeRecorder) -> None:
    original = warm(f, image, recorder)
    CHANGES[change](Parts.of(f.model))
    check(f, image, original)


@pytest.mark.parametrize("change", keep(["forward of attention", "forward of channel attention"], CLASSES))
def test_methods_replaced_on_a_class(
    f: Florence2, image: Image.Image, change: str, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = warm(f, image, recorder)
    kind, name = CLASSES[change]
    method = getattr(kind, name)

    def mine(*arguments: Any, **keywords: Any) -> Any:
        out = method(*arguments, **keywords)
        return tuple(value * 1.3 for value in out) if isinstance(out, tuple) else out * 1.3

    monkeypatch.setattr(kind, name, mine)
    check(f, image, original)


def test_hooks_on_all_modules(f: Florence2, image: Image.Image, recorder: TapeRecorder) -> None:
    original = warm(f, image, recorder)

    def louder(module: nn.Module, inputs: Any, output: Any) -> Any:
        return output * 1.3 if isinstance(module, nn.LayerNorm) else None

    handle = nn.modules.module.register_module_forward_hook(louder)
    try:
        check(f, image, original)
    finally:
        handle.remove()
    assert agree(scores(f, image), original)


def test_traces_and_patches(f: Florence2, image: Image.Image, recorder: TapeRecorder) -> None:
    original = warm(f, image, recorder)
    replayed = recorder.replayed
    with f.trace("decoder.*", "encoder.*", "vision_tower.*"):
        assert agree(scores(f, image), original)
    with f.patched({"decoder.layers.0.mlp": lambda value: value * -1}):
        assert not agree(scores(f, image), original)
    assert recorder.replayed == replayed
    assert agree(scores(f, image), original) and recorder.replayed > replayed
