"""Answers by replay, from tapes in the place of CUDA graphs: the tokens of the plain search, whatever was recorded."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from florence2.fast.cuda.recorded import lane as lanes
from florence2.fast.cuda.recorded import slots
from florence2.fast.cuda.recorded.graphs import record_with, recordings
from florence2.fast.cuda.recorded.lane import RecordedLane, open_lane, search_recorded
from florence2.fast.install import install, uninstall
from florence2.generation.engine.lane import Lane
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation, SpecialIds
from florence2.model.florence2 import Florence2Model
from parity.cases import SETTINGS, shapes
from parity.recipe import make_model
from parity.tape import TapeRecorder
from tests.conftest import few_words
from tests.release import keep


@pytest.fixture(autouse=True)
def recorder() -> Iterator[TapeRecorder]:
    recorder = TapeRecorder()
    with record_with(recorder):
        yield recorder


@pytest.fixture(scope="module")
def model() -> Florence2Model:
    shape = few_words(shapes()[3])
    return install(make_model(shape.config, shape.seed, shape.end_bonus))


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return torch.randn(3, 9, 64, generator=torch.Generator().manual_seed(4))


@pytest.fixture
def small_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several buckets within the first tokens."""
    monkeypatch.setattr(slots, "WINDOWS", (4, 8, 16, 32))
    monkeypatch.setattr(slots, "MEMORY_STEP", 4)


@torch.inference_mode()
def replayed(
    model: Florence2Model, memory: Tensor, options: GenerationOptions, mask: Tensor | None = None
) -> Generation:
    found = search_recorded(model, memory, options, SpecialIds(), mask)
    assert found is not None
    return found


def plain(model: Florence2Model, memory: Tensor, options: GenerationOptions, mask: Tensor | None = None) -> Generation:
    """The search of a model that is not installed."""
    return generate(uninstall(copy.deepcopy(model)), memory, options, mask)


def same(one: Generation, other: Generation) -> bool:
    return (
        one.sequences.tolist() == other.sequences.tolist()
        and one.finish_reasons == other.finish_reasons
        and torch.allclose(one.token_logprobs, other.token_logprobs, atol=1e-3)
        and torch.allclose(one.sequence_scores, other.sequence_scores, atol=1e-3)
    )


@pytest.mark.usefixtures("small_buckets")
@pytest.mark.parametrize("changes", keep(range(0, len(SETTINGS), 4), SETTINGS), ids=str)
def test_same_as_the_search(
    model: Florence2Model, memory: Tensor, changes: dict[str, Any], recorder: TapeRecorder
) -> None:
    """Plainly, while recording, and by replay."""
    options = GenerationOptions().changed(**changes)
    expected = plain(model, memory, options)
    for _ in range(3):
        assert same(replayed(model, memory, options), expected)
    assert recorder.replayed > 0


def test_an_untied_model_is_replayed(model: Florence2Model, memory: Tensor) -> None:
    """A replay recorded before is not used again, and the weights of its own are read."""
    untied, options = copy.deepcopy(model), GenerationOptions(num_beams=2, max_new_tokens=8)
    tied = [replayed(untied, memory, options) for _ in range(3)][-1]
    shared = untied.language_model.shared.weight.detach()
    untied.untie_head(shared.flip(0))
    untied.untie_answers(shared.roll(7, 0))
    expected = plain(untied, memory, options)
    for _ in range(3):
        found = replayed(untied, memory, options)
        assert same(found, expected) and not same(found, tied)


@pytest.mark.release
def test_nothing_of_one_call_is_left_in_the_next(model: Florence2Model, memory: Tensor) -> None:
    """Whatever its mask, its length and its number of rows."""
    options = GenerationOptions(max_new_tokens=12)
    short = torch.tensor([[True] * 5 + [False] * 4] * 3)
    calls = [(memory, None), (memory * 2, short), (memory, short), (memory[:, :4], None), (memory[:2], None)]
    for values, mask in calls * 2:
        assert same(replayed(model, values, options, mask), plain(model, values, options, mask))


@torch.inference_mode()
def test_a_mask_is_not_ignored(model: Florence2Model, memory: Tensor) -> None:
    """A call without a mask, one of the same shape with one, and the first again."""
    options = GenerationOptions(max_new_tokens=4, num_return_sequences=3)
    mask = torch.tensor([[True] * 5 + [False] * 4] * len(memory))
    found = [replayed(model, memory, options, each) for each in (None, mask, None)]
    expected = [plain(model, memory, options, each) for each in (None, mask)]
    assert not same(expected[0], expected[1])
    assert all(same(one, other) for one, other in zip(found, (*expected, expected[0]), strict=True))


def test_generate_replays_where_that_is_possible(model: Florence2Model, memory: Tensor, recorder: TapeRecorder) -> None:
    mask = torch.tensor([[True] * 5 + [False] * 4] * 3)
    options = GenerationOptions(max_new_tokens=8)
    for _ in range(3):
        assert same(generate(model, memory, options, mask), plain(model, memory, options, mask))
    assert recorder.replayed > 0


@pytest.mark.release
def test_more_rows_than_the_largest_bucket(
    model: Florence2Model, memory: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are answered in parts, whose answers have different lengths."""
    monkeypatch.setattr(lanes, "ROWS", (1, 2))
    many = torch.cat([memory, memory * 3, memory * -1])
    for options in (GenerationOptions(max_new_tokens=20), GenerationOptions(max_new_tokens=9, num_return_sequences=2)):
        assert same(replayed(model, many, options), plain(model, many, options))


class OwnRule:
    """A rule that may look at values, as far as anybody knows."""

    name = "own"

    def applies(self, generated: int) -> bool:
        return generated > 0

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
        return scores if int(generated.max()) < 99 else scores * 2


@torch.inference_mode()
@pytest.mark.parametrize("changes", [{"sample": True}, {"extra_rules": (OwnRule(),)}], ids=["sample", "extra_rules"])
def test_samples_and_rules_of_ones_own_are_not_recorded(
    model: Florence2Model, memory: Tensor, changes: dict[str, Any]
) -> None:
    """A recorded step would draw the numbers of the first call again, and not look at values."""
    options = GenerationOptions(max_new_tokens=5, num_beams=1).changed(**changes)
    assert search_recorded(model, memory, options, SpecialIds(), None) is None


def test_two_kinds_of_step_are_recorded_in_a_bucket(
    model: Florence2Model, memory: Tensor, recorder: TapeRecorder
) -> None:
    """Those at an end of the answer, where ids are forced, and all others; the first of a kind runs as it is."""
    options = GenerationOptions(max_new_tokens=40, min_new_tokens=39, num_beams=2)
    found = replayed(copy.deepcopy(model), memory, options)
    assert same(found, plain(model, memory, options))
    assert recorder.recorded == 2 and recorder.replayed == 40 - 2


def test_another_model_in_the_same_place_is_not_served_by_it(model: Florence2Model, memory: Tensor) -> None:
    options = GenerationOptions(max_new_tokens=6)
    other = Florence2Model(replace(model.config)).eval()
    other.load_state_dict(model.state_dict())
    install(other)
    for _ in range(3):
        replayed(other, memory, options)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.data = parameter.data * 1.5
    assert same(replayed(other, memory, options), plain(other, memory, options))


class TestLane:
    """Answers that join and leave."""

    OPTIONS = GenerationOptions(max_new_tokens=20, min_new_tokens=19, num_beams=2)

    @pytest.fixture
    def own(self, model: Florence2Model) -> Florence2Model:
        return copy.deepcopy(model)

    def open(self, model: Florence2Model, **changes: Any) -> RecordedLane[Any]:
        lane: RecordedLane[Any] | None = open_lane(model, self.OPTIONS.changed(**changes), SpecialIds())
        assert lane is not None
        return lane

    def finish(self, lane: RecordedLane[Any]) -> dict[Any, Generation]:
        found: dict[Any, Any] = {}
        while len(lane):
            found |= lane.step()
        return found

    @torch.inference_mode()
    def warm(self, model: Florence2Model, memory: Tensor) -> None:
        for _ in range(2):
            lane = self.open(model)
            lane.join(["warm"], memory, lane.options)
            self.finish(lane)

    @pytest.mark.usefixtures("small_buckets")
    @torch.inference_mode()
    def test_answers_grow_through_all_buckets(self, own: Florence2Model, memory: Tensor) -> None:
        """Rows, memory and window, while others are in the middle of their answers; then back to one row."""
        generator = torch.Generator().manual_seed(0)
        memories = [torch.randn(1, length, 64, generator=generator) for length in (3, 9, 5, 17, 4, 8, 30, 6, 7)]
        for _ in range(2):
            lane = self.open(own)
            found: dict[Any, Any] = {}
            for i, each in enumerate(memories):
                lane.join([i], each, lane.options)
                found |= lane.step()
                assert len(lane) == i + 1
            found |= self.finish(lane)
            for i, each in enumerate(memories):
                assert same(found[i], plain(own, each, lane.options))

    @torch.inference_mode()
    def test_a_row_is_free_for_the_next(self, own: Florence2Model, memory: Tensor) -> None:
        """Flags of the answer before it, which are read late, do not end it."""
        lane = self.open(own, min_new_tokens=0, num_beams=1)
        for i in range(12):
            lane.join([i], memory[i % 3 : i % 3 + 1] * (1 + i), lane.options)
            expected = plain(own, memory[i % 3 : i % 3 + 1] * (1 + i), lane.options)
            assert same(self.finish(lane)[i], expected)

    @torch.inference_mode()
    def test_dropped_answers_leave_the_rest_alone(self, own: Florence2Model, memory: Tensor) -> None:
        lane = self.open(own)
        lane.join(["a", "b", "c"], memory, lane.options)
        lane.step()
        lane.drop(lambda name: name == "b")
        assert len(lane) == 2
        lane.step()
        lane.join(["d"], memory[1:2], lane.options)
        found = self.finish(lane)
        assert sorted(found) == ["a", "c", "d"]
        for name, i in (("a", 0), ("c", 2), ("d", 1)):
            assert same(found[name], plain(own, memory[i : i + 1], lane.options))

    @torch.inference_mode()
    def test_numbers_that_are_not_finite_stay_in_their_row(self, own: Florence2Model, memory: Tensor) -> None:
        lane = self.open(own)
        lane.join(["bad"], torch.full((1, 40, 64), float("nan")), lane.options)
        lane.join(["good"], memory[:1], lane.options)
        lane.step()
        lane.drop(lambda name: name == "bad")
        lane.join(["later"], memory[1:2], lane.options)  # in the row of the bad one, with a shorter memory
        found = self.finish(lane)
        assert same(found["good"], plain(own, memory[:1], lane.options))
        assert same(found["later"], plain(own, memory[1:2], lane.options))

    @torch.inference_mode()
    def test_weights_changed_in_place_count_at_the_next_step(
        self, own: Florence2Model, memory: Tensor, recorder: TapeRecorder
    ) -> None:
        self.warm(own, memory[:1])
        before, options = recorder.recorded, self.OPTIONS
        old = plain(own, memory[:1], options)
        own.language_model.decoder.layers[0].fc1.weight.mul_(-3.0)
        found = replayed(own, memory[:1], options)
        assert same(found, plain(own, memory[:1], options)) and not same(found, old)
        assert recorder.recorded == before

    @pytest.mark.parametrize("change", ["hook", "method", "module", "class method"])
    @torch.inference_mode()
    def test_a_change_between_two_steps_is_seen_at_once(
        self, own: Florence2Model, memory: Tensor, change: str, recorder: TapeRecorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The next step runs plainly, or is recorded from what is there now."""
        self.warm(own, memory[:1])
        layer: Any = own.language_model.decoder.layers[0]
        lane = self.open(own)
        lane.join(["a"], memory[:1], lane.options)
        for _ in range(5):
            lane.step()
        calls: list[int] = []
        replays = recorder.replayed
        if change == "hook":
            layer.fc1.register_forward_hook(lambda *_: calls.append(1))
        elif change == "method":
            step = own.step
            monkeypatch.setattr(own, "step", _counting(step, calls))
        elif change == "class method":
            forward = type(layer).forward
            monkeypatch.setattr(type(layer), "forward", _counting(forward, calls))
        else:
            layer.fc1 = copy.deepcopy(layer.fc1)  # of the same class, and so recorded again
            layer.fc1.weight.zero_()
        lane.step()
        assert recorder.replayed == replays and (calls or change == "module")
        if change == "module":
            lane.step()
            assert recorder.replayed == replays + 1
        lane.close()

    @torch.inference_mode()
    def test_an_answer_continues_with_a_swapped_module(self, own: Florence2Model, memory: Tensor) -> None:
        """As by plain steps, from the step at which it changed."""
        other = copy.deepcopy(own.language_model.decoder.layers[0])
        other.fc2.weight.mul_(-2)
        self.warm(own, memory[:1])
        found = []
        for recorded in (True, False):
            model = copy.deepcopy(own)
            lane: Any = self.open(model) if recorded else _plain_lane(model, self.OPTIONS)
            lane.join(["a"], memory[:1], self.OPTIONS)
            for _ in range(6):
                lane.step()
            model.language_model.decoder.layers[0] = copy.deepcopy(other)
            found.append(self.finish(lane)["a"])
        assert same(*found) and not same(found[0], plain(own, memory[:1], self.OPTIONS))

    @torch.inference_mode()
    def test_buffers_are_kept_for_the_next_lane(self, own: Florence2Model, memory: Tensor) -> None:
        self.warm(own, memory[:1])
        assert len(recordings(own)) == 1
        lane = self.open(own)
        lane.join(["a"], memory[:1], lane.options)
        assert len(recordings(own)) == 0  # nobody else may have them meanwhile
        lane.close()
        assert len(recordings(own)) == 1


def _counting(function: Callable[..., Any], calls: list[int]) -> Callable[..., Any]:
    def count(*arguments: Any) -> Any:
        calls.append(1)
        return function(*arguments)

    return count


def _plain_lane(model: Florence2Model, options: GenerationOptions) -> Any:
    return Lane(model, options.width, 4, SpecialIds())
