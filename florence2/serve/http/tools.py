"""What every route that answers needs: the service, bodies, images, and the model's name and settings."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request

from florence2.asking.requests import CheckedRequest
from florence2.cli.main import name_options
from florence2.errors import OptionError, shown
from florence2.generation.options import GenerationOptions
from florence2.serve.errors import RequestError
from florence2.serve.incoming.body import BodyReader
from florence2.serve.incoming.fetch import Fetcher
from florence2.serve.incoming.images import ImageOpener
from florence2.serve.incoming.log import note
from florence2.serve.service import Service
from florence2.serve.settings import Settings
from florence2.serve.work.jobs import Answered

_CASCADES = 16  # at once; they wait most of the time


@dataclass(frozen=True)
class Tools:
    """The parts of a server that its routes share; `cascades` are threads that wait for one answer after another."""

    service: Service
    bodies: BodyReader
    images: ImageOpener
    cascades: ThreadPoolExecutor

    @classmethod
    def of(cls, service: Service, fetcher: Fetcher | None = None) -> "Tools":
        """Return the tools for the routes of a service."""
        fetcher = fetcher or Fetcher(service.settings)
        threads = ThreadPoolExecutor(_CASCADES, thread_name_prefix="florence2-cascade")
        return cls(service, BodyReader(service.settings), ImageOpener(service, fetcher), threads)

    @property
    def settings(self) -> Settings:
        """The server's settings."""
        return self.service.settings

    def check_model(self, name: str | None) -> None:
        """Raise RequestError for a model that is not served here."""
        if name is not None and name not in self.settings.names:
            raise RequestError(
                404,
                "model_not_found",
                f"The model {shown(name)} is not served here. Served: {', '.join(self.settings.names)}.",
                param="model",
            )

    def note(self, request: Request, done: Answered) -> None:
        """Keep what the log says about an answer; its text only where the settings allow it."""
        note(request, done=done)
        if self.settings.log_answers and done.answer is not None:
            note(request, answer=str(done.answer))

    def note_task(self, request: Request, question: CheckedRequest, text: str) -> None:
        """Keep the task for the log; a free prompt only where the settings allow it."""
        known = question.task.token in self.service.model.processor.tasks
        note(request, task=question.task.token if known else "other")
        if self.settings.log_answers:
            note(request, prompt=text)

    def options(self, changes: Mapping[str, Any], names: Mapping[str, str] | None = None) -> GenerationOptions:
        """Return the model's settings with some changed. Raises OptionError, about the fields that `names` has."""
        try:
            return self.service.model.options(**changes)
        except OptionError as error:
            raise OptionError(name_options(str(error), names or {})) from None
