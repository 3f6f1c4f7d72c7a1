"""Streams: answers in the order of the requests, whatever runs beside them; an error keeps its place."""

import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import florence2
import florence2.generation.engine.engine as engine_module
import florence2.stream as stream_module
from florence2.asking.requests import check_request
from florence2.errors import Florence2Error, ImageError, OptionError, PromptError
from florence2.fast.cuda.pixels import DevicePixels
from florence2.generation.budget import images_that_fit, vision_bytes
from florence2.generation.engine.lane import Lane
from florence2.pipeline import Request
from florence2.stream import LiveAnswers, encode_ahead
from parity.recipe import make_picture
from tests.release import keep

TASKS = ("<OD>", "<CAPTION>", "<OCR>", "<DENSE_REGION_CAPTION>", "<MORE_DETAILED_CAPTION>")


@pytest.fixture(scope="module")
def nano() -> florence2.Florence2:
    return florence2.load("nano", device="cpu")


@pytest.fixture(scope="module")
def images(nano: florence2.Florence2) -> list[florence2.EncodedImage]:
    return [nano.encode_image(make_picture(seed, 64, 48)) for seed in range(4)]


@pytest.fixture(scope="module")
def requests(images: list[florence2.EncodedImage]) -> list[Request]:
    return [(TASKS[i % 5], images[i % 4]) for i in range(11)]


@pytest.fixture(scope="module")
def alone(nano: florence2.Florence2, requests: list[Request]) -> list[tuple[int, ...]]:
    """What each request gives by itself, of at most 24 tokens."""
    return [nano.run(*each, options=nano.options(max_new_tokens=24)).token_ids for each in requests]


@pytest.mark.parametrize("batch_size", keep([1, 3], [1, 2, 5, 32]))
def test_answers_are_those_of_run(
    nano: florence2.Florence2, requests: list[Request], alone: list[tuple[int, ...]], batch_size: int
) -> None:
    options = nano.options(max_new_tokens=24)
    streamed = list(nano.stream(iter(requests), options=options, batch_size=batch_size))
    assert [each.token_ids for each in streamed] == alone


def test_an_answer_arrives_before_its_turn(nano: florence2.Florence2, images: list[florence2.EncodedImage]) -> None:
    arrived: dict[int, Any] = {}
    asked = [("<MORE_DETAILED_CAPTION>", images[0]), ImageError("of my own"), ("<OCR>", images[1])]
    stream = nano.stream(asked, batch_size=4, max_new_tokens=24, arrived=arrived.__setitem__)
    first = next(stream)
    assert arrived.keys() >= {0, 1} and arrived[0] is first  # an error waits for the long answer before it
    assert [first, *stream] == [arrived[number] for number in range(3)]


def test_all_slots_are_filled_once_the_first_answer_is_there(
    nano: florence2.Florence2, images: list[florence2.EncodedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    running: list[int] = []
    step, clock = Lane.step, SimpleNamespace(now=0.0)

    def counted(lane: Any) -> Any:
        running.append(len(lane))
        clock.now += 0.001
        return step(lane)

    def requests() -> Iterator[Any]:
        for number in range(30):
            clock.now += 0.1
            yield "<OD>", images[number % 4]

    for module in (stream_module, engine_module):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(Lane, "step", counted)
    stream = nano.stream(requests(), batch_size=6, min_new_tokens=10, max_new_tokens=11)
    next(stream)
    before = len(running)
    assert len(list(stream)) == 29
    assert max(running[:before]) < 6 and running[before + 1 :].count(6) > len(running[before:]) // 2


def test_errors_keep_their_places(nano: florence2.Florence2, images: list[florence2.EncodedImage]) -> None:
    def requests() -> Iterator[Any]:
        yield "<CAPTION>", images[0]
        yield ImageError("of my own")
        yield "<CAPTION>", Path("absent.png")
        yield "<NOTHING_KNOWN>", images[0]
        yield "<REGION_TO_OCR>", images[0], (100, 5, 160, 20)
        yield "<CAPTION>", images[1]

    found = list(nano.stream(requests(), max_new_tokens=5))
    kinds = [type(each) for each in found]
    assert kinds == [florence2.Answer, ImageError, ImageError, PromptError, PromptError, florence2.Answer]
    assert [str(each)[:12] for each in found[1:4]] == ["of my own", "absent.png d", "Unknown task"]


def test_the_next_request_is_taken_when_there_is_room(
    nano: florence2.Florence2, images: list[florence2.EncodedImage]
) -> None:
    taken = []

    def requests() -> Iterator[Request]:
        for i in range(40):
            taken.append(i)
            yield "<CAPTION>", images[i % 4]

    stream: Any = nano.stream(requests(), batch_size=2, max_new_tokens=4, num_beams=1)
    next(stream)
    assert len(taken) <= 2 * 2 + 1  # a slow answer at the head holds back a few times the slots
    stream.close()
    assert len(taken) < 40


def test_a_short_answer_makes_room_for_the_next(
    nano: florence2.Florence2, images: list[florence2.EncodedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at once: the sum of all steps over two, and not the sum of the longest of each pair."""
    steps: list[int] = []
    original = nano.model.step

    def step(ids: torch.Tensor, cache: Any) -> torch.Tensor:
        steps.append(len(ids))
        return original(ids, cache)

    monkeypatch.setattr(nano.model, "step", step)
    answers = nano.run_batch(
        [(task, images[0]) for task in ("<OD>", "<CAPTION>", "<OD>", "<CAPTION>")], batch_size=2, num_beams=1
    )
    lengths = [len(answer.token_ids) - 1 for answer in answers]
    assert sum(steps) == sum(lengths)
    assert len(steps) < max(lengths[:2]) + max(lengths[2:])


def test_traced_requests_are_answered_in_batches(nano: florence2.Florence2, requests: list[Request]) -> None:
    options = nano.options(max_new_tokens=6)
    plain = list(nano.stream(requests, options=options))
    with nano.trace("memory") as t:
        seen = list(nano.stream(requests, options=options, batch_size=4))
    assert [each.token_ids for each in seen] == [each.token_ids for each in plain] and len(t.runs) == 11


def test_a_model_with_a_cache_of_its_own_is_not_stepped_otherwise(
    nano: florence2.Florence2, requests: list[Request], monkeypatch: pytest.MonkeyPatch
) -> None:
    started, original = [], nano.model.start_cache

    def start_cache(memory: torch.Tensor, *rest: Any) -> Any:
        started.append(len(memory))
        return original(memory, *rest)

    monkeypatch.setattr(nano.model, "start_cache", start_cache)
    found = list(nano.stream([*requests[:3], PromptError("no"), requests[3]], batch_size=4, max_new_tokens=3))
    assert started == [3, 1] and [isinstance(each, Florence2Error) for each in found] == [False] * 3 + [True, False]


def test_in_batches_only_the_culprit_fails(
    nano: florence2.Florence2, requests: list[Request], images: list[florence2.EncodedImage]
) -> None:
    bad = ("<REGION_TO_OCR>", images[0], (100, 5, 160, 20))
    with nano.trace("memory"):
        found = list(nano.stream([requests[0], bad, requests[1]], max_new_tokens=3))
    assert [type(each) for each in found] == [florence2.Answer, PromptError, florence2.Answer]


def test_images_of_another_model(nano: florence2.Florence2, images: list[florence2.EncodedImage]) -> None:
    foreign = florence2.EncodedImage(torch.zeros(1, 5, 7), (10, 10))
    found = list(nano.stream([("<OD>", foreign), ("<OD>", images[0])], max_new_tokens=3))
    assert "a different model" in str(found[0]) and isinstance(found[1], florence2.Answer)


def test_what_does_not_fit_alone_is_refused(
    nano: florence2.Florence2, images: list[florence2.EncodedImage], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("florence2.generation.budget.free_bytes", lambda _: 1000)
    (error,) = nano.stream([("<OD>", images[0])])
    assert isinstance(error, OptionError) and "lower max_new_tokens or num_beams" in str(error)


def test_a_failing_source_keeps_the_answers_before_it(
    nano: florence2.Florence2, images: list[florence2.EncodedImage]
) -> None:
    def requests() -> Iterator[Request]:
        yield from [("<CAPTION>", images[0])] * 5
        raise RuntimeError("of the caller")

    found = []
    with pytest.raises(RuntimeError, match="of the caller"):
        for answer in nano.stream(requests(), max_new_tokens=4):
            found.append(answer)  # noqa: PERF402  the error comes last
    assert len(found) == 5


def test_errors_come_out_before_more_is_taken(nano: florence2.Florence2) -> None:
    taken: list[int] = []

    def requests() -> Iterator[Any]:
        for i in range(9):
            taken.append(i)
            yield ImageError(str(i))

    for count, _ in enumerate(nano.stream(requests()), 1):
        assert len(taken) == count


@pytest.mark.parametrize("shape", [(5, 160), (2, 5, 160)])
def test_features_of_a_wrong_shape(nano: florence2.Florence2, shape: tuple[int, ...]) -> None:
    (error,) = nano.stream([("<OD>", florence2.EncodedImage(torch.zeros(shape), (10, 10)))])
    assert "it must be (1, tokens, values)" in str(error)


@pytest.mark.parametrize("wrong", [5, None, "abc", {"a": 1}])
def test_requests_that_are_not_a_row(nano: florence2.Florence2, wrong: Any) -> None:
    with pytest.raises(PromptError, match="requests is "):
        nano.stream(wrong)


def test_a_background_for_an_encoded_image_is_refused(
    nano: florence2.Florence2, images: list[florence2.EncodedImage]
) -> None:
    with pytest.raises(OptionError, match="no effect on an EncodedImage"):
        nano.run_batch([("<OD>", images[0])], background="white")


def test_nothing(nano: florence2.Florence2) -> None:
    assert list(nano.stream([])) == []


def test_images_are_encoded_in_their_order(nano: florence2.Florence2) -> None:
    def prepare(item: int) -> florence2.pipeline.PreparedImage:
        if item == 2:
            raise ImageError("two")
        return nano.prepare_image(Image.new("RGB", (10 + item, 10)))

    found = list(encode_ahead(nano, iter(range(5)), prepare))
    assert [item for item, _ in found] == list(range(5))
    assert [str(i) if isinstance(i, Florence2Error) else i.size[0] for _, i in found] == [10, 11, "two", 13, 14]
    assert list(encode_ahead(nano, iter(()), prepare)) == []


class Accelerated(florence2.Florence2):
    """A model that is planned as if it were on an accelerator; it notes how many images are encoded together."""

    def __init__(self, f: florence2.Florence2):
        super().__init__(f.model, f.processor)
        self.together: list[int] = []

    def images_at_once(self, most: int) -> int:
        config = self.processor.image_config
        each = vision_bytes(self.model.config.vision, config.height, config.width, self.model.dtype)
        return images_that_fit(each, self.model.device, most, 0.25)

    def _encode_together(self, images: Any) -> Any:
        self.together.append(len(images))
        return super()._encode_together(images)


@pytest.mark.parametrize(
    ("room", "batch_size", "together"), keep([0, 2], [(3.9, None, [3, 3, 1]), (99, None, [7]), (99, 4, [4, 3])])
)
def test_images_are_encoded_together_as_memory_allows(
    room: float, batch_size: int | None, together: list[int], nano: florence2.Florence2, monkeypatch: pytest.MonkeyPatch
) -> None:
    f, config = Accelerated(nano), nano.processor.image_config
    each = vision_bytes(nano.model.config.vision, config.height, config.width, nano.model.dtype)
    monkeypatch.setattr("florence2.generation.budget.free_bytes", lambda _: 4 * room * each)
    items = [Image.new("RGB", (20 + i, 20)) for i in range(7)]
    encoded = [image for _, image in encode_ahead(f, iter(items), f.prepare_image, batch_size)]
    assert f.together == together and [image.size[0] for image in encoded] == list(range(20, 27))
    f.together.clear()
    assert len(f.encode_images([f.prepare_image(item) for item in items])) == 7 and f.together[0] == min(7, int(room))


def test_how_many_images_by_the_device(nano: florence2.Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    assert nano.images_at_once(64) == 1
    monkeypatch.setattr(type(nano.model), "device", torch.device("cuda"))
    monkeypatch.setattr("florence2.generation.budget.free_bytes", lambda _: 10**9)
    config = nano.processor.image_config
    each = vision_bytes(nano.model.config.vision, config.height, config.width, nano.model.dtype)
    assert nano.images_at_once(10**6) == 10**9 // 4 // each and nano.images_at_once(3) == 3


@pytest.fixture
def several_readers(nano: florence2.Florence2) -> florence2.Florence2:
    class Threads(DevicePixels):
        threads = 4

    model = florence2.Florence2(nano.model, nano.processor)
    model.pixels = Threads()
    return model


def test_several_threads_keep_the_order(several_readers: florence2.Florence2) -> None:
    def prepare(item: int) -> florence2.pipeline.PreparedImage:
        time.sleep(0.02 * (item % 3 == 0))
        if item == 2:
            raise ImageError("two")
        return several_readers.prepare_image(Image.new("RGB", (10 + item, 10)))

    taken = []

    def items() -> Iterator[int]:
        for item in range(20):
            taken.append(item)
            yield item

    found = []
    for item, image in encode_ahead(several_readers, items(), prepare):
        found.append((item, str(image) if isinstance(image, Florence2Error) else image.size[0]))
        assert len(taken) <= len(found) + 4  # one for each thread
    assert found == [(item, "two" if item == 2 else 10 + item) for item in range(20)]


def test_what_was_taken_before_a_failure_comes_first(several_readers: florence2.Florence2) -> None:
    def items() -> Iterator[int]:
        yield from range(3)
        raise RuntimeError("of the caller's")

    encoded = encode_ahead(several_readers, items(), lambda _: several_readers.prepare_image(Image.new("RGB", (9, 9))))
    assert [next(encoded)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="of the caller's"):
        next(encoded)


# ---- requests at any time ------------------------------------------------------------------------------------------


def step_until_idle(live: LiveAnswers) -> dict[Any, Any]:
    ended: dict[Any, Any] = {}
    while live.engine.busy:
        ended.update(live.step())
    return ended


def test_requests_join_while_others_run(nano: florence2.Florence2, requests: list[Request]) -> None:
    options, live = nano.options(max_new_tokens=24), LiveAnswers(nano, 3, decoding_share=0.5)
    tickets: dict[Any, Any] = {}
    ended: dict[Any, Any] = {}
    for request in requests:
        tickets[live.submit(check_request((request[0], b"")), request[1], options)] = request
        ended.update(live.step())
    ended.update(step_until_idle(live))
    assert {ticket: answer.token_ids for ticket, answer in ended.items()} == {
        ticket: nano.run(*request, options=options).token_ids for ticket, request in tickets.items()
    }


def test_a_cancelled_request_has_no_answer(nano: florence2.Florence2, images: list[florence2.EncodedImage]) -> None:
    live, options = LiveAnswers(nano, 2), nano.options(max_new_tokens=12)
    first, second = (live.submit(check_request(("<OD>", b"")), image, options) for image in images[:2])
    live.step()
    live.cancel(first)
    live.cancel(first)
    assert set(step_until_idle(live)) == {second}
    third = live.submit(check_request(("<OD>", b"")), images[0], options)
    live.cancel(third)
    assert step_until_idle(live) == {}


def test_the_ids_so_far(nano: florence2.Florence2, images: list[florence2.EncodedImage]) -> None:
    live, answer = LiveAnswers(nano, 2, decoding_share=0.5), None
    greedy = live.submit(check_request(("<CAPTION>", b"")), images[0], nano.options(num_beams=1, max_new_tokens=12))
    beams = live.submit(check_request(("<CAPTION>", b"")), images[0], nano.options(max_new_tokens=12))
    seen = []
    while answer is None:
        answer = dict(live.step()).get(greedy)
        seen.append(live.written(greedy))
        assert live.written(beams) == []
    assert all(ids == list(answer.token_ids[: len(ids)]) for ids in seen) and len(seen) > 5
    assert [len(ids) for ids in seen[:3]] == [2, 3, 4]


def test_a_model_with_a_search_of_its_own(nano: florence2.Florence2, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nano.model, "search", lambda *_: None, raising=False)
    with pytest.raises(Florence2Error, match="code of its own"):
        LiveAnswers(nano, 2)
