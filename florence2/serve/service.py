"""The service: one model, its queue and its worker, and what the HTTP side asks of them."""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeAlias

from florence2.answers.answer import Answer
from florence2.asking.processor import AnswerProcessor
from florence2.asking.questions import Questions
from florence2.asking.requests import CheckedRequest, EncodedImage, Request, check_request
from florence2.errors import PromptError
from florence2.generation.engine.features import FeatureCache
from florence2.generation.options import GenerationOptions
from florence2.inputs.image import Colour, ImageInput
from florence2.inputs.processor import TaskText
from florence2.pipeline import Florence2
from florence2.serve.errors import RequestError
from florence2.serve.metrics import Metrics
from florence2.serve.settings import Settings
from florence2.serve.work.crew import Crew
from florence2.serve.work.jobs import Answered, HeldImage, Job
from florence2.serve.work.knowledge import Knowledge
from florence2.serve.work.queue import JobQueue
from florence2.serve.work.worker import Worker

Loader: TypeAlias = Callable[[], Florence2]

_LOADING = "The model is being loaded; try again in a few seconds."
_OVER = "The server is stopping, and the time for requests that it had accepted is over; send the request again."
_DRAINING = "The server is stopping and takes no more requests; send the request to another one."


class Service:
    """Everything between the routes and the model."""

    def __init__(self, load: Loader | Sequence[tuple[str, Loader]], settings: Settings):
        """Make a service that has not begun to load its model.

        `load` returns the model, which is then computed in this process; or it has, for each of several devices, a
        name and a function that returns the model there, in a process of its own.
        """
        self.settings, self.metrics = settings, Metrics(settings)
        self.worker: Worker | Crew
        if callable(load):
            self.queue = JobQueue(settings, FeatureCache(settings.cache_bytes))
            self.worker = Worker(load, self.queue, settings, self.metrics, self._loaded)
        else:
            self.queue = JobQueue(settings, FeatureCache(settings.cache_bytes * len(load)))
            self.worker = Crew(load, self.queue, settings, self.metrics, self._loaded)
        self.metrics.watch(self.queue)
        self.created = int(time.time())

    @property
    def model(self) -> Knowledge:
        """The model without its weights. Raises RequestError while it is being loaded."""
        model = self.worker.model
        if self.queue.closed is not None:
            raise self.queue.closed
        if model is None:
            raise RequestError(503, "loading", _LOADING, retry_after=2)
        return model

    def announce(self, address: str) -> None:
        """Say on stderr where the server listens, and that the model is ready once it is."""
        print(f"florence2: listening on {address}, loading {self.settings.names[0]}", file=sys.stderr, flush=True)

    def _loaded(self) -> None:
        """Say that the model is loaded, unless it could not be."""
        model = self.worker.model
        if model is not None:
            self.metrics.know_tasks(frozenset(model.processor.tasks))
            self.metrics.alive(1)
            print("florence2: ready", file=sys.stderr, flush=True)

    def check_ready(self) -> None:
        """Raise RequestError unless requests are answered now."""
        assert self.model

    @property
    def is_drained(self) -> bool:
        """Whether no job is left."""
        return self.queue.is_empty

    def drain(self) -> None:
        """Accept no more jobs."""
        self.queue.close(RequestError(503, "draining", _DRAINING, retry_after=2))

    def give_up(self) -> None:
        """Let jobs that are left fail at the next step, so that their clients hear of it."""
        self.worker.give_up(RequestError(503, "draining", _OVER, retry_after=2))

    @property
    def facts(self) -> dict[str, Any]:
        """Versions, and the hash of the weights in memory. Raises RequestError while they are being loaded."""
        assert self.model
        return self.worker.facts()

    def check(self, task: str, text: TaskText = None) -> CheckedRequest:
        """Return a question whose task exists and takes its input. Raises PromptError."""
        return check_request((task, b"", text), self.model.processor.tasks)

    def hold(self, data: bytes | None, sha256: str, owner: str) -> HeldImage:
        """Return an image for jobs, by its bytes or by their hash alone; `owner` is who may use it again.

        Raises RequestError where only the hash is given and the image is not kept.
        """
        key: Any = (owner, sha256)
        if not self.settings.cache_bytes and data is not None:
            key = object()  # without a cache, requests share nothing
        held = self.queue.hold(key, data)
        if held is None:
            raise RequestError(
                404,
                "picture_not_cached",
                f"No image with the SHA-256 {sha256[:16]}... is kept here; send the image itself.",
                param="image",
            )
        return held

    def submit(self, jobs: Sequence[Job]) -> list["Future[Answered]"]:
        """Accept jobs, all or none; return their answers to come. Raises RequestError."""
        for job in jobs:
            job.cached = job.image.encoded is not None
        self.queue.put(jobs)
        for job in jobs:
            self.metrics.asked(job.cached)
            job.future.add_done_callback(self._count)
        return [job.future for job in jobs]

    def _count(self, future: "Future[Answered]") -> None:
        if not future.cancelled() and future.exception() is None:
            self.metrics.answered(future.result())


class ServedQuestions(Questions):
    """Questions by name, answered by a service among all others, for one image; each call waits for its answers."""

    def __init__(self, service: Service, image: HeldImage, options: GenerationOptions, deadline: float):
        """Ask about `image`, with `options`, until `deadline`."""
        self._service, self._image, self._options, self._deadline = service, image, options, deadline
        self._data = image.data  # for a process that does not have the image any more
        self.processor: AnswerProcessor = service.model.processor
        self.done: list[Answered] = []
        self._asked: list[Future[Answered]] = []
        self._left = False

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        background: Colour | None = None,  # noqa: ARG002
        options: GenerationOptions | None = None,
        batch_size: int | None = None,  # noqa: ARG002
        **settings: Any,  # noqa: ARG002
    ) -> list[Answer]:
        """Answer many tasks."""
        jobs = []
        for request in requests:
            image = request[1]
            if not isinstance(image, EncodedImage):
                raise PromptError("The image must be encoded first.")
            held = HeldImage(object(), self._data, image)
            question = self._service.check(request[0], request[2] if len(request) == 3 else None)
            jobs.append(Job(question, held, options or self._options, self._deadline))
        return [answered.answer for answered in self._wait(jobs) if answered.answer is not None]

    def encode_image(self, image: ImageInput, background: Colour | None = None) -> EncodedImage:  # noqa: ARG002
        """Encode the image of these questions."""
        return self._wait([Job(None, self._image, self._options, self._deadline)])[0].image

    def leave(self) -> None:
        """Cancel the questions that are open, and ask nothing more."""
        self._left = True
        for future in self._asked:
            future.cancel()

    def _wait(self, jobs: Sequence[Job]) -> list[Answered]:
        self._asked = self._service.submit(jobs)
        if self._left:
            self.leave()
        done = [future.result() for future in self._asked]
        self.done += done
        return done
