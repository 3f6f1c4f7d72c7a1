"""The process of one device: a model, a queue and a worker, which take their jobs from a pipe."""

import contextlib
import pickle
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

from florence2.generation.engine.features import FeatureCache
from florence2.pipeline import Florence2
from florence2.serve.settings import MIB, Settings
from florence2.serve.work import messages
from florence2.serve.work.jobs import Answered, Job
from florence2.serve.work.queue import JobQueue
from florence2.serve.work.worker import Worker

_LEAST_CACHE = 64 * MIB  # for images that a running request asks about again; no other request knows their keys


def run_device(connection: Connection, load: Callable[[], Florence2], settings: Settings, threads: int | None) -> None:
    """Answer jobs until the pipe is closed; `threads` of the CPU compute, None leaves their number to torch."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # the server decides when to end, after the last answer
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    Device(connection, load, settings).run()


class Device:
    """The jobs of a pipe, answered by a worker of this process."""

    def __init__(self, connection: Connection, load: Callable[[], Florence2], settings: Settings):
        """Begin to load the model."""
        self._connection, self._lock = connection, threading.Lock()
        self._jobs: dict[int, Job] = {}
        self._queue = JobQueue(settings, FeatureCache(max(settings.cache_bytes, _LEAST_CACHE)))
        self._worker = Worker(load, self._queue, settings, ForwardedMetrics(self._send), self._loaded)
        self._worker.start()

    def run(self) -> None:
        """Take jobs until the pipe is closed."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self._connection.recv()
                if isinstance(message, messages.Ask):
                    self._ask(message)
                elif (left := self._jobs.get(message.number)) is not None:  # it may have ended meanwhile
                    left.future.cancel()

    def _loaded(self) -> None:
        error, model = self._worker.failure, self._worker.model
        if model is None:
            self._send(messages.Broken(_portable(error or RuntimeError("no model"))))
        else:
            self._send(messages.Ready(model, self._worker.facts()))

    def _ask(self, ask: messages.Ask) -> None:
        image = self._queue.hold(ask.key, ask.data)
        if image is None:
            self._send(messages.Missing(ask.number))
            return
        listener = partial(self._wrote, ask.number) if ask.listens else None
        job = Job(ask.question, image, ask.options, ask.deadline, listener, times=ask.times)
        self._jobs[ask.number] = job
        job.future.add_done_callback(partial(self._ended, ask.number))
        self._queue.put([job], limited=False)

    def _wrote(self, number: int, ids: list[int]) -> None:
        self._send(messages.Wrote(number, ids))

    def _ended(self, number: int, future: "Future[Answered]") -> None:
        job = self._jobs.pop(number)
        if future.cancelled():
            self._send(messages.JobFailed(number, None))
        elif error := future.exception():
            self._send(messages.JobFailed(number, _portable(error)))
        else:
            done = future.result()
            features = done.image.features
            shape, size = tuple(features.shape), features.nbytes
            self._send(
                messages.JobDone(number, done.answer, done.prompt_tokens, job.times, shape, size, done.image.size)
            )

    def _send(self, message: Any) -> None:
        with self._lock, contextlib.suppress(OSError):  # the server is gone, so nobody waits
            self._connection.send(message)


class ForwardedMetrics:
    """The measurements of a worker, sent to the server that reports them."""

    def __init__(self, send: Callable[[Any], None]):
        """Send with `send`."""
        self._send = send

    def encoded(self, images: int, seconds: float) -> None:
        """Report images that were encoded together."""
        self._send(messages.Encoded(images, seconds))

    def stepped(self, rows: int, seconds: float) -> None:
        """Report one step of the decoder."""
        self._send(messages.Stepped(rows, seconds))


def _portable(error: BaseException) -> Exception:
    """Return the error, or its words where it cannot be sent to another process."""
    try:
        copy = pickle.loads(pickle.dumps(error))
    except Exception:  # noqa: BLE001
        copy = None
    return copy if isinstance(copy, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
