"""The worker: one thread that owns the engine, pulls jobs from the queue when it has room, and answers them."""

import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from florence2.answers.answer import Answer
from florence2.errors import Florence2Error
from florence2.pipeline import Florence2
from florence2.serve.errors import RequestError
from florence2.serve.settings import Settings
from florence2.serve.work.jobs import HeldImage, Job
from florence2.serve.work.knowledge import Knowledge, describe_weights
from florence2.serve.work.queue import JobQueue
from florence2.serve.work.reading import ImageReader
from florence2.stream import LiveAnswers

CPU_BATCH, DEVICE_BATCH = 8, 64
"""How many answers run at once, by default: more gain nothing on a CPU."""
# of the time, for answers that run while others start: little, so that the slots fill, after which nothing starts
_DECODING_SHARE = 0.1
_MEMORY_SHARE = 0.5  # of what is free, for answers that run
_READ_AHEAD = 4  # images that are read before there is room for them
LOOKS = 0.05
"""Seconds between two looks at the deadlines."""


class WorkMetrics(Protocol):
    """What a worker measures."""

    def encoded(self, images: int, seconds: float) -> None:
        """Count images that were encoded together."""
        ...

    def stepped(self, rows: int, seconds: float) -> None:
        """Count one step of the decoder."""
        ...


class Worker:
    """A thread with a model. It loads the model itself, so that the server can say so meanwhile."""

    def __init__(
        self,
        load: Callable[[], Florence2],
        queue: JobQueue,
        settings: Settings,
        metrics: WorkMetrics,
        loaded: Callable[[], None] = lambda: None,
    ):
        """Make a worker that has not begun.

        `load` returns the model, in the worker's thread; `loaded` is called after it, also where it failed.
        """
        self._load, self._queue, self._settings, self._metrics = load, queue, settings, metrics
        self._loaded = loaded
        self._changed = threading.Event()
        queue.watch(self._changed.set)
        self._thread = threading.Thread(target=self._run, name="florence2-worker", daemon=True)
        self._stopping, self._looked = False, 0.0
        self._given_up: Exception | None = None
        self._running: dict[Any, Job] = {}
        self.model: Knowledge | None = None
        self._facts: dict[str, Any] = {}
        self.failure: Exception | None = None

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End after the present step; jobs that are left fail."""
        self._stopping = True
        self._changed.set()
        self._thread.join(timeout=10)

    def facts(self) -> dict[str, Any]:
        """Return versions, and the hash of the weights in memory."""
        self._facts = self._facts or describe_weights(self._florence2)
        return self._facts

    def give_up(self, error: Exception) -> None:
        """Fail all jobs with `error` at the next step, from another thread."""
        self._given_up = error
        self._changed.set()

    def _run(self) -> None:
        try:
            self._prepare(self._load())
        except Exception as error:  # noqa: BLE001  whoever has started the server is told
            self.failure = error
        self._loaded()
        if self.failure is not None:
            return
        while not self._stopping:
            self._turn_safely()
        self._reader.stop()
        self._fail_all(RequestError(503, "draining", "The server is stopping; send the request again.", retry_after=1))

    def _prepare(self, model: Florence2) -> None:
        cpu = model.model.device.type == "cpu"
        self._slots = self._settings.max_batch or (CPU_BATCH if cpu else DEVICE_BATCH)
        self._queue.slots = self._slots
        self._reader = ImageReader(model, self._settings.max_pixels, self._changed.set)
        self._at_once = model.images_at_once(self._slots)
        self._florence2 = model
        self._answers = self._make_answers()
        self.model = Knowledge(model.processor, model.options(), self._slots)

    def _make_answers(self) -> LiveAnswers:
        return LiveAnswers(self._florence2, self._slots, memory_share=_MEMORY_SHARE, decoding_share=_DECODING_SHARE)

    def _turn_safely(self) -> None:
        """Do one turn; an accelerator without memory, or a bug, fails the jobs that run and none after them."""
        try:
            self._turn()
        except Exception as error:  # noqa: BLE001
            traceback.print_exc(file=sys.stderr)
            self._start_again(error)

    def _turn(self) -> None:
        """Do everything that can be done now, and one step; wait where there is nothing."""
        self._changed.clear()
        if self._given_up is not None:
            self._fail_all(self._given_up)
        self._drop()
        self._reader.start(self._queue.first(self._slots + _READ_AHEAD))
        self._admit()
        if self._answers.engine.busy:
            self._step()
        else:
            self._changed.wait(LOOKS if len(self._queue) else None)

    # ---- jobs that end early ---------------------------------------------------------------------------------------

    def _drop(self) -> None:
        """Let jobs go whose client has left, and those whose time is over."""
        now = time.monotonic()
        look = now - self._looked >= LOOKS
        self._looked = now if look else self._looked
        drop_over(self._queue, look)
        for ticket, job in list(self._running.items()):
            if job.was_left or now > job.deadline:
                self._answers.cancel(ticket)
                del self._running[ticket]
                job.fail(too_late(job))
                self._queue.done(job)

    def _start_again(self, error: Exception) -> None:
        """Fail what runs, and begin with a new engine."""
        for job in self._running.values():
            job.fail(error)
            self._queue.done(job)
        self._running.clear()
        self._answers = self._make_answers()

    def _fail_all(self, error: Exception) -> None:
        fail_waiting(self._queue, error)
        for ticket, job in self._running.items():
            self._answers.cancel(ticket)
            job.fail(error)
            self._queue.done(job)
        self._running.clear()

    # ---- jobs that begin -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Start jobs while there is room and time, those with one image together."""
        engine = self._answers.engine
        while (room := self._slots - engine.unfinished) > 0 and not engine.owes_decoding:
            jobs = self._queue.take(min(room, self._at_once), lambda job: job.image.is_ready)
            if not jobs:
                return
            started = time.monotonic()
            try:
                self._encode(jobs)
            except Exception as error:  # noqa: BLE001  such as an accelerator without memory
                self._fail_taken(jobs, error)
                continue
            engine.charge(time.monotonic() - started)
            for job in jobs:
                self._begin(job)

    def _fail_taken(self, jobs: Sequence[Job], error: Exception) -> None:
        if not isinstance(error, Florence2Error):
            traceback.print_exception(error, file=sys.stderr)
        for job in jobs:
            self._end(job, error)

    def _encode(self, jobs: Sequence[Job]) -> None:
        """Encode the images of jobs, each once; one that could not be read has its error instead."""
        new = {id(job.image): job.image for job in jobs if job.image.encoded is None}
        readable = [image for image in new.values() if image.reading and image.reading.exception() is None]
        if not readable:
            return
        started = time.monotonic()
        encoded = self._florence2.encode_images([image.reading.result() for image in readable if image.reading])
        took = time.monotonic() - started
        self._metrics.encoded(len(readable), took)
        for image, result in zip(readable, encoded, strict=True):
            self._keep(image, result)
        for job in jobs:
            job.times.encoding = took if job.image in readable else 0.0

    def _keep(self, image: HeldImage, encoded: Any) -> None:
        image.encoded, image.data, image.reading = encoded, None, None
        self._queue.cache.put(image.key, encoded, encoded.features.nbytes)

    def _begin(self, job: Job) -> None:
        """Give a job to the engine; one that only wants its image, or cannot be answered, ends here."""
        job.times.started = time.monotonic()
        image = job.image
        if image.encoded is None:
            error = image.reading.exception() if image.reading else None
            self._end(job, error if isinstance(error, Florence2Error) else RuntimeError(f"no image: {error!r}"))
        elif job.question is None:
            self._end(job, None)
        else:
            try:
                job.ticket = self._answers.submit(job.question, image.encoded, job.options)
                self._running[job.ticket] = job
            except Florence2Error as error:
                self._end(job, error)

    # ---- jobs that run ---------------------------------------------------------------------------------------------

    def _step(self) -> None:
        """Advance all answers by one id, and hand out those that ended."""
        started, rows = time.monotonic(), self._answers.engine.unfinished
        ended = self._answers.step()
        self._metrics.stepped(rows, time.monotonic() - started)
        for ticket, outcome in ended:
            job = self._running.pop(ticket, None)
            if job is not None:
                self._end(job, outcome)
        for ticket, job in self._running.items():
            if job.times.first_id is None:
                job.times.first_id = time.monotonic()
            if job.listener is not None:
                job.listener(self._answers.written(ticket))

    def _end(self, job: Job, outcome: Answer | Exception | None) -> None:
        """Tell whoever waits for a job how it ended."""
        if isinstance(outcome, Exception):
            job.fail(outcome)
        else:
            job.finish(outcome, 0 if job.ticket is None else len(job.ticket.work.prompt))
        self._queue.done(job)


def too_late(job: Job) -> RequestError:
    """Return why a job was given up."""
    waited = time.monotonic() - job.times.accepted
    return RequestError(
        504,
        "deadline_exceeded",
        f"The request could not be answered in its time and was given up after {waited:.1f} s. Allow more time, or "
        "send fewer requests at once.",
    )


def drop_over(queue: JobQueue, look: bool) -> None:
    """Let waiting jobs go whose client has left and, where `look`, those whose time is over."""
    for job in queue.drop(lambda job: job.was_left or (look and queue.cannot_meet(job))):
        job.fail(too_late(job))


def fail_waiting(queue: JobQueue, error: Exception) -> None:
    """Fail all jobs that wait."""
    for job in queue.drop(lambda _: True):
        job.fail(error)
