"""One process a device, in the place of one worker: all pull from the one queue."""

import os
from collections.abc import Callable, Sequence
from typing import Any

from florence2.pipeline import Florence2
from florence2.serve.errors import RequestError
from florence2.serve.metrics import Metrics
from florence2.serve.settings import Settings
from florence2.serve.work.knowledge import Knowledge
from florence2.serve.work.queue import JobQueue
from florence2.serve.work.remote import STOPPING, Home, RemoteWorker
from florence2.serve.work.worker import fail_waiting


class Crew:
    """The processes of all devices, in the place of one worker."""

    def __init__(
        self,
        loads: Sequence[tuple[str, Callable[[], Florence2]]],
        queue: JobQueue,
        settings: Settings,
        metrics: Metrics,
        loaded: Callable[[], None] = lambda: None,
    ):
        """Make processes that have not begun.

        `loads` has for each device its name, and what loads the model there; `loaded` is called once all of them have.
        """
        self.queue, self.settings, self.metrics = queue, settings, metrics
        self._loaded = loaded
        self.stopping = self._all_loaded = False
        self.failure: Exception | None = None
        self.given_up: Exception | None = None
        shared = sum(name.startswith("cpu") for name, _ in loads)
        threads = max(1, (os.cpu_count() or 1) // shared) if shared else None
        self._workers = [
            RemoteWorker(name, load, threads if name.startswith("cpu") else None, self) for name, load in loads
        ]

    @property
    def model(self) -> Knowledge | None:
        """The model without its weights; None while no process has it."""
        return next((worker.model for worker in self._workers if worker.model is not None), None)

    @property
    def fewest_jobs(self) -> int:
        """How many jobs the process has that has fewest."""
        return min(worker.job_count for worker in self._workers)

    def facts(self) -> dict[str, Any]:
        """Return versions, and the hash of the weights in memory."""
        return next((worker.facts for worker in self._workers if worker.facts), {})

    def start(self) -> None:
        """Begin."""
        for worker in self._workers:
            worker.start()

    def stop(self) -> None:
        """End at once; jobs that are left fail."""
        self.stopping = True
        self.queue.tell()
        for worker in self._workers:
            worker.join()
        fail_waiting(self.queue, RequestError(503, "draining", STOPPING, retry_after=1))

    def give_up(self, error: Exception) -> None:
        """Fail all jobs with `error`, from another thread."""
        self.given_up = error
        self.queue.tell()

    def loaded(self) -> None:
        """Count the slots of a process that has its model."""
        ready = [worker.model for worker in self._workers if worker.model is not None]
        self.queue.slots = sum(model.slots for model in ready)
        if len(ready) == len(self._workers) and not self._all_loaded:
            self._all_loaded = True
            self._loaded()
        self.metrics.alive(len(ready))
        self.queue.tell()

    def broken(self, error: Exception, was_ready: bool) -> None:
        """Take why a model could not be loaded: the end of the server, unless it had been loaded before."""
        if not was_ready:
            self.failure = error

    def forget(self, home: Home) -> None:
        """Forget a dead process, and the images that it had."""
        self.metrics.alive(sum(worker.model is not None for worker in self._workers))
        self.queue.cache.drop(lambda image: image.features.home is home)
