"""`POST /v1/florence2`: several tasks on one image, regions in pixels, and answers with all coordinates and scores."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from florence2.answers.cascade import Cascade
from florence2.asking.requests import CheckedRequest
from florence2.errors import Florence2Error, PromptError
from florence2.generation.options import GenerationOptions
from florence2.serve.errors import RequestError, explain
from florence2.serve.http.schemas import OptionsBody, TaskBody, TasksBody
from florence2.serve.http.streaming import EventStream, Growing, event, stream_answer
from florence2.serve.http.tools import Tools
from florence2.serve.http.waiting import deadline_of, outcomes, unless_left
from florence2.serve.incoming.body import media_type
from florence2.serve.incoming.images import GivenImage, OpenedImage
from florence2.serve.service import ServedQuestions
from florence2.serve.work.jobs import Answered, Job

_CASCADE = "cascade"


@dataclass(frozen=True)
class TasksRequest:
    """A request with its image, ready to be asked."""

    request: Request
    body: TasksBody
    image: OpenedImage
    options: GenerationOptions
    deadline: float


async def answer_tasks(request: Request, tools: Tools) -> Response:
    """Answer the tasks of a request. Raises RequestError or a Florence2Error where none can be answered."""
    deadline = deadline_of(request, tools.settings)
    body, file = await _read(request, tools)
    tools.check_model(body.model)
    options = tools.options((body.options or OptionsBody()).changes())
    questions = [_check(task, tools) for task in body.tasks]
    if all(isinstance(question, Exception) for question in questions):
        raise next(question for question in questions if isinstance(question, Exception))
    image = await tools.images.open(request, _given(body, file))
    asked = TasksRequest(request, body, image, options, deadline)
    if body.stream:
        return await _stream_tasks(asked, questions, tools)
    return JSONResponse(await unless_left(request, _answer_all(asked, questions, tools)))


async def _read(request: Request, tools: Tools) -> tuple[TasksBody, bytes | None]:
    if media_type(request) == "multipart/form-data":
        values, file = await tools.bodies.form(request)
        return TasksBody.read(values), file
    return TasksBody.read(await tools.bodies.json(request)), None


def _given(body: TasksBody, file: bytes | None) -> GivenImage:
    """Return how a request names its image. Raises RequestError unless it names exactly one."""
    image = body.image
    if isinstance(image, str):
        given = {"data": image}
    else:
        values = image.model_dump(include={"data", "url", "sha256"}) if image is not None else {}
        given = {name: value for name, value in values.items() if value is not None}
    if len(given) + (file is not None) != 1:
        names = [*given, *(["the file"] if file is not None else [])]
        raise RequestError(
            400,
            "invalid_image",
            f"The image is given by {', '.join(names) or 'nothing'}; give exactly one of data, url, sha256, or a file "
            "in a form.",
            param="image",
        )
    return GivenImage(**given, file=file)


def _check(task: TaskBody, tools: Tools) -> CheckedRequest | Florence2Error | None:
    """Return a question, None for a cascade, or the error that stands in the place of an answer."""
    try:
        if task.task == _CASCADE:
            if task.text is not None or task.box is not None:
                raise PromptError("The task cascade takes neither text nor box; leave them out.")
            return None
        if task.text is not None and task.box is not None:
            raise PromptError(f"Task {task.task[:60]} has both text and box; give one.")
        return tools.service.check(task.task, task.text if task.box is None else task.box)
    except PromptError as error:
        return error


async def _answer_all(
    asked: TasksRequest, questions: Sequence[CheckedRequest | Florence2Error | None], tools: Tools
) -> dict[str, Any]:
    """Answer all questions at once; return the body of the response. Raises where all fail alike."""
    jobs = _jobs(asked, questions, tools)
    coming = iter(await outcomes(tools.service.submit(jobs)) if jobs else [])
    results: list[Answered | BaseException | tuple[Cascade, Answered]] = []
    for question in questions:
        if isinstance(question, Exception):
            results.append(question)
        elif question is None:
            results.append(await _cascade(asked, tools))
        else:
            results.append(next(coming))
    good = [result for result in results if not isinstance(result, BaseException)]
    if not good:
        raise next(result for result in results if isinstance(result, Exception))
    done = [result[1] if isinstance(result, tuple) else result for result in good]
    for each in done:
        tools.note(asked.request, each)
    return {
        "model": tools.settings.names[0],
        "picture": _about(asked.image, done[0]),
        "answers": [_to_dict(asked.request, result) for result in results],
        "timing": _timing(done),
    }


def _jobs(asked: TasksRequest, questions: Sequence[CheckedRequest | Florence2Error | None], tools: Tools) -> list[Job]:
    """Return a job for each question that an answer alone settles."""
    jobs = []
    for question, task in zip(questions, asked.body.tasks, strict=True):
        if isinstance(question, CheckedRequest):
            tools.note_task(asked.request, question, task.task)
            jobs.append(Job(question, asked.image.held, asked.options, asked.deadline))
    return jobs


async def _cascade(asked: TasksRequest, tools: Tools) -> tuple[Cascade, Answered] | BaseException:
    """Return a cascade and the encoding of its image, or what kept it from one."""
    questions = ServedQuestions(tools.service, asked.image.held, asked.options, asked.deadline)
    loop = asyncio.get_running_loop()
    try:
        cascade: Cascade = await loop.run_in_executor(tools.cascades, lambda: questions.cascade(b""))
    except asyncio.CancelledError:
        questions.leave()
        raise
    except Exception as error:  # noqa: BLE001  it stands in the place of the answer
        return error
    return cascade, questions.done[0]


def _about(image: OpenedImage, done: Answered) -> dict[str, Any]:
    width, height = done.image.size
    return {"sha256": image.sha256, "width": width, "height": height, "cached": done.cached}


def _timing(done: Sequence[Answered]) -> dict[str, float]:
    """Return the longest of each stage, in milliseconds."""
    times = [each.times.in_ms() for each in done]
    return {name: max(each[name] for each in times) for name in times[0]}


def _to_dict(request: Request, result: Answered | BaseException | tuple[Cascade, Answered]) -> dict[str, Any]:
    if isinstance(result, tuple):
        return {"task": _CASCADE, **result[0].to_dict()}
    if isinstance(result, Answered):
        assert result.answer is not None
        return {**result.answer.to_dict(), "florence2_result": result.answer.to_florence()}
    error = result if isinstance(result, Exception) else RuntimeError(type(result).__name__)
    return explain(error, str(request.scope.get("florence2.id", ""))).body()


# ---- streaming -----------------------------------------------------------------------------------------------------


async def _stream_tasks(
    asked: TasksRequest, questions: Sequence[CheckedRequest | Florence2Error | None], tools: Tools
) -> Response:
    """Answer by events: boxes as they close, where one beam was asked for, then each answer, in order."""
    loop = asyncio.get_running_loop()
    growing: list[Growing | None] = []
    jobs = _jobs(asked, questions, tools)
    for job in jobs:
        grows = Growing(loop) if asked.options.width == 1 else None
        growing.append(grows)
        job.listener = grows.hear if grows else None
    futures = tools.service.submit(jobs) if jobs else []

    def leave() -> None:
        for future in futures:
            future.cancel()

    def failure(error: Exception) -> dict[str, Any]:
        return _to_dict(asked.request, error)

    parts = _events(asked, questions, list(zip(jobs, futures, growing, strict=True)), tools)
    return await EventStream.start(asked.request, parts, failure, leave)


async def _events(
    asked: TasksRequest,
    questions: Sequence[CheckedRequest | Florence2Error | None],
    running: list[tuple[Job, "Future[Answered]", Growing | None]],
    tools: Tools,
) -> AsyncIterator[bytes | None]:
    done: list[Answered] = []
    coming = iter(running)
    for index, question in enumerate(questions):
        result: Answered | BaseException | tuple[Cascade, Answered]
        if question is None:
            result = await _cascade(asked, tools)
        elif isinstance(question, Exception):
            result = question
        else:
            job, future, growing = next(coming)
            boxes = OpenBoxes(tools, job)
            try:
                async for part in stream_answer(future, growing):
                    if isinstance(part, Answered):
                        result = part
                    elif part is None:
                        yield None
                    elif closed := boxes.closed(part):
                        yield event({"index": index, "boxes": closed})
            except Exception as error:  # noqa: BLE001  it stands in the place of the answer
                result = error
        if not isinstance(result, BaseException):
            done.append(result[1] if isinstance(result, tuple) else result)
            tools.note(asked.request, done[-1])
        yield event({"index": index, "answer": _to_dict(asked.request, result)})
    last = {"model": tools.settings.names[0]}
    if done:
        last |= {"picture": _about(asked.image, done[0]), "timing": _timing(done)}  # type: ignore[dict-item]
    yield event(last)
    yield b"data: [DONE]\n\n"


class OpenBoxes:
    """The boxes of an answer that is being written, each given out once."""

    def __init__(self, tools: Tools, job: Job):
        """Read the answer of `job`."""
        self._processor, self._job, self._given = tools.service.model.processor, job, 0

    def closed(self, ids: list[int]) -> list[dict[str, Any]]:
        """Return the boxes that are complete in `ids` and were not given out yet."""
        encoded, question = self._job.image.encoded, self._job.question
        if encoded is None or question is None:
            return []
        boxes = self._processor.answer(question.task, image_size=encoded.size, token_ids=ids).boxes
        new, self._given = boxes[self._given :], max(self._given, len(boxes))
        return [{"xyxy": list(box.xyxy), "label": box.label} for box in new]
