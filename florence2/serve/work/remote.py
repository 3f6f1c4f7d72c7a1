"""The server's side of one device's process: it is kept alive, given jobs, and heard."""

import contextlib
import multiprocessing
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any

from florence2.asking.requests import EncodedImage
from florence2.pipeline import Florence2
from florence2.serve.errors import RequestError
from florence2.serve.work import messages
from florence2.serve.work.device import run_device
from florence2.serve.work.jobs import HeldImage, Job
from florence2.serve.work.knowledge import Knowledge
from florence2.serve.work.worker import LOOKS, drop_over, fail_waiting

if TYPE_CHECKING:
    from florence2.serve.work.crew import Crew

_READ_AHEAD = 4  # jobs that a device gets before it has room, so that it reads their images meanwhile
_FIRST_PAUSE, _LONGEST_PAUSE = 0.25, 30.0  # seconds before a dead process is started again
_LOST = "The process that computed this answer died twice; send the request again."
STOPPING = "The server is stopping; send the request again."


@dataclass(frozen=True)
class RemoteFeatures:
    """The features of an image that another process has: their key there, and their shape and bytes."""

    home: "Home"
    key: Any
    shape: tuple[int, ...]
    nbytes: int


class Home:
    """One life of a process; what it holds is lost when it dies."""

    def __init__(self, connection: Connection, process: Any):
        """Join a process and the pipe to it."""
        self.connection, self.process = connection, process
        self.jobs: dict[int, Job] = {}
        self.leaving: set[int] = set()
        self.dead = False


class RemoteWorker:
    """A thread that keeps the process of one device alive, and jobs in it."""

    def __init__(self, name: str, load: Callable[[], Florence2], threads: int | None, crew: "Crew"):
        """Make a worker that has not begun. `load` is called in the process, which `name` says in messages."""
        self._name, self._load, self._threads, self._crew = name, load, threads, crew
        self._queue, self._settings, self._metrics = crew.queue, crew.settings, crew.metrics
        self._woken, self._wake = multiprocessing.get_context("spawn").Pipe(duplex=False)
        os.set_blocking(self._wake.fileno(), False)
        self._thread = threading.Thread(target=self._run, name=f"florence2-{name}", daemon=True)
        self._looked, self._next = 0.0, 0
        self.home: Home | None = None
        self.model: Knowledge | None = None
        self.facts: dict[str, Any] = {}
        self.was_ready = False
        self._queue.watch(self.wake)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(timeout=10)

    def wake(self) -> None:
        """Let the thread look for work, from any thread."""
        with contextlib.suppress(OSError):  # so many calls are waiting that it will look anyhow
            os.write(self._wake.fileno(), b"x")

    @property
    def job_count(self) -> int:
        """How many jobs the process has; more than any other has while it takes none."""
        home = self.home
        return len(home.jobs) if home is not None and self.model is not None else sys.maxsize

    # ---- the life of the process -----------------------------------------------------------------------------------

    def _run(self) -> None:
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            try:
                self._live()
            except Exception as error:  # noqa: BLE001  it costs the process, whose jobs go to another, and not the thread
                traceback.print_exc(file=sys.stderr)
                self._crew.broken(error, self.was_ready)
            if self._crew.stopping or self._crew.failure is not None:
                return
            self._metrics.restarted()
            pause = _FIRST_PAUSE if time.monotonic() - began > _LONGEST_PAUSE else min(2 * pause, _LONGEST_PAUSE)
            print(f"florence2: starting the process of {self._name} again in {pause:g} s", file=sys.stderr, flush=True)
            end = time.monotonic() + pause
            while time.monotonic() < end and not self._crew.stopping:
                time.sleep(LOOKS)

    def _live(self) -> None:
        """Start the process, and keep it busy until it dies or the server stops."""
        context = multiprocessing.get_context("spawn")
        connection, theirs = context.Pipe()
        arguments = (theirs, self._load, self._settings, self._threads)
        process = context.Process(target=run_device, args=arguments, name=f"florence2-{self._name}", daemon=True)
        process.start()
        theirs.close()
        self.home = home = Home(connection, process)
        try:
            while not self._crew.stopping:
                self._turn(home)
        except (EOFError, OSError):
            process.join(timeout=1)
            if not self._crew.stopping and self._crew.failure is None:
                print(
                    f"florence2: the process of {self._name} died (exit code {process.exitcode}) with "
                    f"{len(home.jobs)} requests, which are given to the next",
                    file=sys.stderr,
                    flush=True,
                )
        finally:
            self._bury(home)

    def _bury(self, home: Home) -> None:
        """Let go of a process, and give its jobs to another; a job that this happens to twice fails."""
        home.dead, self.home, self.model = True, None, None
        home.connection.close()
        home.process.kill()
        home.process.join()
        self._crew.forget(home)
        jobs = list(home.jobs.values())
        home.jobs.clear()
        if self._crew.stopping:
            error: Exception = RequestError(503, "draining", STOPPING, retry_after=1)
        else:
            error = RequestError(503, "worker_lost", _LOST, retry_after=1)
        lost = [job for job in jobs if job.given_back or self._crew.stopping]
        for job in lost:
            job.fail(error)
            self._queue.done(job)
        back = [job for job in jobs if job not in lost]
        for job in back:
            job.given_back, job.image.home = True, None
        self._queue.give_back(back)

    # ---- its jobs --------------------------------------------------------------------------------------------------

    def _turn(self, home: Home) -> None:
        """Hear what the process says, then give it jobs; wait where there is nothing."""
        ready = wait([home.connection, self._woken], LOOKS if len(self._queue) else None)
        if self._woken in ready:
            os.read(self._woken.fileno(), 65536)
        while home.connection.poll():
            self._hear(home, home.connection.recv())
        look = time.monotonic() - self._looked >= LOOKS
        self._looked = time.monotonic() if look else self._looked
        drop_over(self._queue, look)
        for number, job in home.jobs.items():
            if job.was_left and number not in home.leaving:
                self._leave(home, number)
        if self._crew.given_up is not None:
            self._give_up(home, self._crew.given_up)
        if self.model is not None:
            self._feed(home, self.model.slots + _READ_AHEAD)

    def _leave(self, home: Home, number: int) -> None:
        home.leaving.add(number)
        home.connection.send(messages.Leave(number))

    def _give_up(self, home: Home, error: Exception) -> None:
        fail_waiting(self._queue, error)
        for number, job in list(home.jobs.items()):
            self._leave(home, number)
            job.fail(error)
            self._end(home, number, job)

    def _feed(self, home: Home, most: int) -> None:
        """Send jobs whose image is here, and those for any device while no other has fewer jobs."""

        def can_start(job: Job) -> bool:
            where = _home_of(job.image)
            if where is None or where.dead:
                return len(home.jobs) <= self._crew.fewest_jobs
            return where is home

        while len(home.jobs) < most and (taken := self._queue.take(1, can_start)):
            self._send(home, taken[0])
            self._queue.tell()  # now others may have fewer

    def _send(self, home: Home, job: Job, again: bool = False) -> None:
        """Send a job; its image only where it is not there yet."""
        image, self._next = job.image, self._next + 1
        known = _home_of(image) is home and not again
        if not known and image.data is None:
            job.fail(_not_kept())
            self._queue.done(job)
            return
        features = image.encoded.features if image.encoded is not None else None
        key = features.key if known and features is not None else _key_of(image)
        image.home = home
        home.jobs[self._next] = job
        data = None if known else image.data
        home.connection.send(
            messages.Ask(
                self._next, job.question, job.options, key, data, job.times, job.deadline, job.listener is not None
            )
        )

    def _hear(self, home: Home, message: Any) -> None:
        """Take what the process says."""
        if isinstance(message, messages.Ready):
            self.model, self.facts, self.was_ready = message.knowledge, message.facts, True
            self._crew.loaded()
        elif isinstance(message, messages.Broken):
            self._break(message.error)
        elif isinstance(message, messages.Encoded):
            self._metrics.encoded(message.images, message.seconds)
        elif isinstance(message, messages.Stepped):
            self._metrics.stepped(message.rows, message.seconds)
        elif isinstance(message, messages.Wrote):
            self._tell(home.jobs.get(message.number), message.ids)
        elif (job := home.jobs.get(message.number)) is not None:
            self._hear_end(home, job, message)

    def _break(self, error: Exception) -> None:
        """End the life of a process that could not load the model."""
        self._crew.broken(error, self.was_ready)
        raise EOFError

    def _hear_end(
        self, home: Home, job: Job, message: messages.JobDone | messages.JobFailed | messages.Missing
    ) -> None:
        """Tell whoever waits for a job how it ended; one whose image is missing begins again."""
        if isinstance(message, messages.Missing):
            del home.jobs[message.number]
            self._send(home, job, again=True)
            return
        if isinstance(message, messages.JobDone):
            job.times = message.times
            self._keep(home, job.image, message)
            job.finish(message.answer, message.prompt_tokens)
        elif message.error is not None:
            job.fail(message.error)
        self._end(home, message.number, job)

    def _keep(self, home: Home, image: HeldImage, done: messages.JobDone) -> None:
        """Remember which process has an image."""
        if image.encoded is None or _home_of(image) is not home:
            features = RemoteFeatures(home, _key_of(image), done.shape, done.size)
            image.encoded = EncodedImage(features, done.image_size)
            self._queue.cache.put(image.key, image.encoded, done.size)

    def _end(self, home: Home, number: int, job: Job) -> None:
        del home.jobs[number]
        home.leaving.discard(number)
        self._queue.done(job)

    def _tell(self, job: Job | None, ids: list[int]) -> None:
        if job is not None and job.listener is not None:
            job.listener(ids)


def _home_of(image: HeldImage) -> Home | None:
    """Return the process that has an image, or that was sent it."""
    home: Home | None = image.home if image.encoded is None else image.encoded.features.home
    return home


def _key_of(image: HeldImage) -> Any:
    """Return the key of an image in all processes; one that requests do not share has a key of its own."""
    return image.key if isinstance(image.key, tuple) else image.serial


def _not_kept() -> RequestError:
    sentence = "The image is not kept any more, since the process that had it died; send the image itself."
    return RequestError(404, "picture_not_cached", sentence, param="image")
