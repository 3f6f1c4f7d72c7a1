"""The bounded queue between the HTTP side and the workers: jobs in the order in which they came."""

import math
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence

from florence2.asking.requests import EncodedImage
from florence2.generation.engine.features import FeatureCache
from florence2.serve.errors import RequestError
from florence2.serve.settings import Settings
from florence2.serve.work.jobs import HeldImage, Job

_FORGETS = 0.1  # the weight of the newest answer in the mean time that answers take
_LONGEST_WAIT = 60  # seconds, of Retry-After


class JobQueue:
    """Jobs that wait, limited by their number and by the bytes of their images. Threads share it.

    Attributes:
        slots: How many jobs the workers run at once, for the estimate of a wait.
        closed: Why no more jobs are accepted; None while they are.
    """

    def __init__(self, settings: Settings, cache: FeatureCache[EncodedImage]):
        self._settings, self.cache = settings, cache
        self._watchers: list[Callable[[], None]] = []
        self.slots = 1
        self.closed: RequestError | None = None
        self._lock = threading.Lock()
        self._waiting: deque[Job] = deque()
        self._held: dict[Hashable, HeldImage] = {}
        self._bytes = 0
        self._mean, self._quickest = 0.0, 0.0  # seconds that an answer takes once it has started
        self.running = 0

    def watch(self, tell: Callable[[], None]) -> None:
        """Call `tell` whenever a worker may have something to do."""
        self._watchers.append(tell)

    def tell(self) -> None:
        """Let all workers look."""
        for watcher in self._watchers:
            watcher()

    def __len__(self) -> int:
        """Count the jobs that wait."""
        return len(self._waiting)

    @property
    def held_bytes(self) -> int:
        """The bytes of the images that jobs wait for or use."""
        return self._bytes

    @property
    def is_empty(self) -> bool:
        """Whether no job waits or runs."""
        return not self._waiting and not self.running

    def hold(self, key: Hashable, data: bytes | None) -> HeldImage | None:
        """Return the image of a key, for jobs to be put: cached, held for earlier jobs, or new with its `data`.

        Returns None where it is neither kept nor sent.
        """
        encoded = self.cache.get(key)
        if encoded is not None:
            return HeldImage(key, data, encoded, encoded.features.nbytes + len(data or b""))
        if data is None:
            return self._held.get(key)
        return HeldImage(key, data, size=len(data))

    def put(self, jobs: Sequence[Job], limited: bool = True) -> None:
        """Accept jobs, all or none. Raises RequestError where the queue is closed or, unless not `limited`, full."""
        with self._lock:
            if self.closed is not None:
                raise self.closed
            if limited:
                self._check_room(jobs)
            for job in jobs:
                held = self._held.setdefault(job.image.key, job.image)
                if held.encoded is None and job.image.encoded is not None:
                    held.encoded = job.image.encoded
                job.image = held
                self._bytes += 0 if held.users else held.size
                held.users += 1
                self._waiting.append(job)
                job.future.add_done_callback(self._wake)
        self.tell()

    def _check_room(self, jobs: Sequence[Job]) -> None:
        """Raise RequestError where the jobs would be too many, or their images too large, together with those here."""
        new = {job.image.key: job.image.size for job in jobs if job.image.key not in self._held}
        if len(self._waiting) + len(jobs) > self._settings.max_queue:
            what = f"{len(self._waiting)} requests wait already, of at most {self._settings.max_queue}"
        elif self._bytes + sum(new.values()) > self._settings.queue_bytes:
            what = f"the images of waiting requests may take {self._settings.queue_bytes >> 20} MiB together"
        elif self._waiting and time.monotonic() + self._wait() > min(job.deadline for job in jobs):
            what = f"{len(self._waiting)} requests wait already, for longer than this one may take"
        else:
            return
        seconds = self.retry_after()
        raise RequestError(
            429, "queue_full", f"The server is busy: {what}. Try again in {seconds} s.", retry_after=seconds
        )

    def _wake(self, _: object) -> None:
        self.tell()

    def first(self, count: int) -> list[Job]:
        """Return the next `count` jobs, which stay in the queue."""
        with self._lock:
            return [job for _, job in zip(range(count), self._waiting, strict=False)]

    def take(self, most: int, can_start: Callable[[Job], bool]) -> list[Job]:
        """Take up to `most` of the jobs that can start, in their order."""
        with self._lock:
            taken = [job for job in self._waiting if can_start(job)][:most]
            for job in taken:
                self._waiting.remove(job)
            self.running += len(taken)
        return taken

    def give_back(self, jobs: Sequence[Job]) -> None:
        """Put jobs that were taken before all that wait, in their order; a closed queue has room for them too."""
        with self._lock:
            self._waiting.extendleft(reversed(jobs))
            self.running -= len(jobs)
        self.tell()

    def drop(self, is_over: Callable[[Job], bool]) -> list[Job]:
        """Take the waiting jobs that are over before they began."""
        with self._lock:
            over = [job for job in self._waiting if is_over(job)]
            for job in over:
                self._waiting.remove(job)
                self._release(job)
        return over

    def done(self, job: Job) -> None:
        """Forget a job that ran, and learn from an answer how long answers take."""
        with self._lock:
            self.running -= 1
            self._release(job)
            if job.times.started is not None and job.times.ended is not None and not job.was_left:
                took = job.times.ended - job.times.started + job.times.encoding
                self._mean = took if not self._mean else (1 - _FORGETS) * self._mean + _FORGETS * took
                self._quickest = took if not self._quickest else min(took, self._quickest)

    def _release(self, job: Job) -> None:
        held = job.image
        held.users -= 1
        if not held.users and self._held.get(held.key) is held:
            del self._held[held.key]
            self._bytes -= held.size

    def cannot_meet(self, job: Job) -> bool:
        """Return whether a job that has not begun can no longer end before its deadline."""
        return time.monotonic() + self._quickest > job.deadline

    def retry_after(self) -> int:
        """Return the seconds in which the jobs that wait will have been answered, 1 to 60."""
        return min(max(math.ceil(self._wait()), 1), _LONGEST_WAIT)

    def _wait(self) -> float:
        """Estimate the seconds until a job that comes now would start."""
        return len(self._waiting) * self._mean / self.slots

    def close(self, error: RequestError) -> None:
        """Refuse further jobs with `error`; those that were accepted stay."""
        self.closed = error
        self.tell()
