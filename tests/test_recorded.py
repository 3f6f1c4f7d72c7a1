"""`python -m parity --device`: its comparisons can fail."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch

import florence2
from florence2.fast.cuda.recorded.graphs import RecordingError, record_with
from florence2.pipeline import Florence2
from parity import recorded
from parity.tape import TapeRecorder


@pytest.fixture(scope="module")
def f() -> Florence2:
    return florence2.load("nano", device="cpu")


def do_nothing(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """A recording that leaves the buffers as they are."""
    return lambda: None


@torch.no_grad()
def test_images_and_prompts(f: Florence2) -> None:
    model = copy.deepcopy(f.model)
    images = torch.randn(3, 1, 3, 192, 192, generator=torch.Generator().manual_seed(7))
    cases: list[recorded.Case] = [partial(recorded._encode_image, pixel_values=each) for each in images]
    for recorder, right in ((TapeRecorder(), True), (do_nothing, False)):
        with record_with(recorder):
            for part in (cases, recorded._prompts(model)[:2]):
                equal, total, *_ = recorded._compare(model, part)
                assert (equal == total) == right


@pytest.mark.release
@torch.no_grad()
def test_changes(f: Florence2) -> None:
    with record_with(TapeRecorder()):
        equal, total, *_ = recorded._compare_changed(f.model, lambda part: part.weight.mul_(-2))
        assert equal == total
        equal, total, *_ = recorded._compare_changed(f.model, lambda part: None)  # nothing changes the features
        assert equal < total


def test_recordings_that_fail_are_counted() -> None:
    def fail(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        raise RecordingError("out of memory")

    recorder = recorded._Counting(fail)
    with pytest.raises(RecordingError):
        recorder(lambda: None, torch.device("cpu"))
    assert (recorder.recorded, recorder.failed) == (1, 1)
