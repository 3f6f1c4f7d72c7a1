"""Any number of requests: answers in their order, while the next ones are taken, read and encoded."""

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from florence2.answers.answer import Answer
from florence2.asking.batches import Asked, Coming, answer_in_batches
from florence2.asking.requests import Arrived, CheckedRequest, EncodedImage, PreparedImage
from florence2.errors import Florence2Error
from florence2.fast.install import plain_class
from florence2.generation.budget import USABLE
from florence2.generation.engine.engine import Engine, Ticket, Work
from florence2.generation.options import GenerationOptions
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import NO_TRACE, start_trace
from florence2.runner import Runner

Item = TypeVar("Item")
MAX_IMAGES = 64
"""How many images an accelerator encodes together at most; more gain little."""
MAX_SLOTS = 64
"""How many answers run at once where nobody says it; more gain little, on a CPU and on a GPU."""
_MEMORY_SHARE = 0.25  # of what is free, for the answers that run where nobody has said how many
_AHEAD = 2  # times the slots: how many answers may wait for a slower one before them


def answer_stream(
    runner: Runner,
    asked: Iterable[Asked | Florence2Error],
    options: GenerationOptions,
    slots: int | None,
    decoding_share: float = 0.0,
    arrived: Arrived | None = None,
) -> Iterator[Answer | Florence2Error]:
    """Answer requests on encoded images; each is taken from `asked` when there is room for it.

    A request that is refused has its error in the place of its answer, and so has one that is an error already.

    Args:
        runner: What answers.
        asked: The requests, or errors.
        options: Generation settings of all.
        slots: How many are answered at once; None is as many as a quarter of the free memory holds, at most 64.
        decoding_share: The least share of the time, 0 up to 1, that running answers get while others are taken, until
            the first one is given out: with more, it comes sooner. Then all slots are filled, for the most answers in
            all.
        arrived: Called with a request's number from 0 and its answer or error, as soon as that is known.
    """
    report = arrived or (lambda *_: None)
    if _can_use_engine(runner):
        yield from _AnsweredInOrder(runner, options, slots, decoding_share, report).run(asked)
    else:
        yield from answer_in_batches(
            lambda part: runner._answer([request for request, _ in part], [image for _, image in part], options),
            asked,
            slots or MAX_SLOTS,
            report,
        )


def encode_ahead(
    runner: Runner, items: Iterable[Item], prepare: Callable[[Item], PreparedImage], at_once: int | None = None
) -> Iterator[tuple[Item, EncodedImage | Florence2Error]]:
    """Yield each item with its encoded image, or why it has none; threads prepare the next ones meanwhile.

    An accelerator encodes up to `at_once` images together, as `images_at_once` plans; a CPU is as fast with one. Beyond
    these, one image for each thread is prepared ahead. (For a CPU one thread reads, for a CUDA device several; see
    `DevicePixels.threads`.) If `items` raises, what it gave before comes first.
    """
    threads = runner.choose_pixels().threads
    size = images_at_once(runner, at_once)
    pending: deque[tuple[Item, Future[PreparedImage | Florence2Error]]] = deque()
    coming = Coming(items)
    with ThreadPoolExecutor(threads) as readers:
        while True:
            for item in coming.take(threads + size - len(pending)):
                pending.append((item, readers.submit(_or_error, prepare, item)))
            if not pending:
                break
            part = [pending.popleft() for _ in range(min(size, len(pending)))]
            yield from _encode_read(runner, [(item, reading.result()) for item, reading in part])
    if coming.failure is not None:
        raise coming.failure


def images_at_once(runner: Runner, slots: int | None) -> int:
    """Return how many images are encoded together where `slots` requests are answered at once.

    On an accelerator that is as many as a quarter of the free memory holds, at most `MAX_IMAGES`; on a CPU, one.
    """
    return runner.images_at_once(min(slots or MAX_IMAGES, MAX_IMAGES))


def _or_error(prepare: Callable[[Item], PreparedImage], item: Item) -> PreparedImage | Florence2Error:
    try:
        return prepare(item)
    except Florence2Error as error:
        return error


def _encode_read(
    runner: Runner, read: Sequence[tuple[Item, PreparedImage | Florence2Error]]
) -> Iterator[tuple[Item, EncodedImage | Florence2Error]]:
    encoded: Iterator[EncodedImage | Florence2Error]
    try:
        encoded = iter(runner.encode_images([image for _, image in read if isinstance(image, PreparedImage)]))
    except Florence2Error as error:  # about the checkpoint's image size, and so the same for all
        encoded = itertools.repeat(error)
    for item, image in read:
        yield item, next(encoded) if isinstance(image, PreparedImage) else image


def _can_use_engine(runner: Runner) -> bool:
    """Return whether the engine gives what `generate` gives."""
    model = runner.model
    replaced = plain_class(type(model)) is not Florence2Model or {"start_cache", "search"} & vars(model).keys()
    # a trace is shown a whole batch until its last answer ends
    return not replaced and start_trace(runner) is NO_TRACE


@dataclass(eq=False)
class _Place:
    """The number of an answer in the order; `answer` is None until it is known."""

    number: int
    answer: Answer | Florence2Error | None = None


class LiveAnswers:
    """Requests on encoded images, submitted at any time, and their answers as they end. One thread owns it.

    Attributes:
        engine: What computes, for its `busy`, `unfinished`, `charge` and `owes_decoding`.
    """

    def __init__(self, runner: Runner, slots: int, *, memory_share: float = USABLE, decoding_share: float = 0.0):
        """Make one without work.

        Args:
            runner: What answers.
            slots: How many are answered at once, at least 1.
            memory_share: The share of the free memory that running answers may take; see `Engine`.
            decoding_share: The least share of the time that running answers get while others start; see `Engine`.

        Raises:
            OptionError: A value is out of range.
            Florence2Error: The model, or a trace in force, needs whole batches.
        """
        if not _can_use_engine(runner):
            raise Florence2Error(
                "This model searches by code of its own, or is traced, and so cannot take requests at any time; use "
                "run or run_batch."
            )
        self._runner = runner
        self._asked: dict[Ticket, Asked] = {}
        self.engine = Engine(
            runner.model,
            slots,
            cache_bytes=0,
            memory_share=memory_share,
            decoding_share=decoding_share,
            locations=runner.processor.location_ids,
        )

    def submit(self, request: CheckedRequest, image: EncodedImage, options: GenerationOptions) -> Ticket:
        """Put a request into the queue. Raises PromptError or OptionError where it cannot be answered."""
        prompt = self._runner.processor.encode(request.sentence(image.size))
        features = torch.as_tensor(image.features)  # those of florence2.lite are an array
        ticket = self.engine.submit(Work(prompt, options, features=features))
        self._asked[ticket] = request, image
        return ticket

    def written(self, ticket: Ticket) -> list[int]:
        """Return the ids so far, the start id first, of a running answer without beams; none of any other."""
        return self.engine.written(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """Let a request leave at the next step, without an answer."""
        if self._asked.pop(ticket, None) is not None:
            self.engine.cancel(ticket)

    def step(self) -> list[tuple[Ticket, Answer | Florence2Error]]:
        """Advance every running answer by one id; return those that ended, an error in place of one that failed."""
        ended: list[tuple[Ticket, Answer | Florence2Error]] = []
        for done in self.engine.step():
            request, image = self._asked.pop(done.ticket)
            if done.generation is None:
                assert done.error is not None
                ended.append((done.ticket, done.error))
            else:
                ended.append((done.ticket, self._runner._read(done.generation, request.task, image)))
        return ended


class _AnsweredInOrder:
    """The requests that one engine works on, and their answers until it is their turn."""

    def __init__(
        self, runner: Runner, options: GenerationOptions, slots: int | None, decoding_share: float, arrived: Arrived
    ):
        self._options, self._slots = options, slots or MAX_SLOTS
        self._arrived, self._numbers = arrived, itertools.count()
        memory_share = _MEMORY_SHARE if slots is None else USABLE
        self._live = LiveAnswers(runner, self._slots, memory_share=memory_share, decoding_share=decoding_share)
        self._engine = self._live.engine
        self._failure: Exception | None = None
        self._places: deque[_Place] = deque()
        self._running: dict[Ticket, _Place] = {}

    def run(self, asked: Iterable[Asked | Florence2Error]) -> Iterator[Answer | Florence2Error]:
        """Yield an answer or error for each of `asked`."""
        coming = iter(asked)
        while True:
            while self._places and (answer := self._places[0].answer) is not None:
                self._places.popleft()
                yield answer
                if isinstance(answer, Answer):
                    self._engine.fill_slots()
            exhausted = self._failure is not None or not self._take(coming)
            if self._running:
                self._step()
            elif exhausted and not self._places:
                break
        if self._failure is not None:
            raise self._failure

    def _take(self, coming: Iterator[Asked | Florence2Error]) -> bool:
        """Submit what there is room and time for. Return False when nothing more comes."""
        while self._has_room():
            started = time.perf_counter()
            try:
                each = next(coming, None)  # reads and encodes an image, as a rule
            except Exception as error:  # noqa: BLE001  of the caller's; the answers before it come first
                self._failure = error
                return False
            if each is None:
                return False
            self._engine.charge(time.perf_counter() - started)
            self._submit(each)
        return True

    def _has_room(self) -> bool:
        if self._places and self._places[0].answer is not None:  # to be given out first
            return False
        few = self._engine.unfinished < self._slots and len(self._places) < _AHEAD * self._slots
        return few and not self._engine.owes_decoding

    def _submit(self, each: Asked | Florence2Error) -> None:
        self._places.append(place := _Place(next(self._numbers)))
        if isinstance(each, Florence2Error):
            self._settle(place, each)
            return
        try:
            self._running[self._live.submit(*each, self._options)] = place
        except Florence2Error as error:
            self._settle(place, error)

    def _step(self) -> None:
        for ticket, answer in self._live.step():
            self._settle(self._running.pop(ticket), answer)

    def _settle(self, place: _Place, answer: Answer | Florence2Error) -> None:
        place.answer = answer
        self._arrived(place.number, answer)
