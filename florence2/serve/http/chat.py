"""`POST /v1/chat/completions`: a chat with one image and one question, and its answer as a completion."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from florence2.answers.answer import Answer
from florence2.generation.options import GenerationOptions
from florence2.serve.errors import RequestError, explain
from florence2.serve.http.prompts import ChatQuestion, find_question, ignored, unsupported
from florence2.serve.http.schemas import ChatBody, Inputs
from florence2.serve.http.streaming import EventStream, Growing, event, stream_answer
from florence2.serve.http.tools import Tools
from florence2.serve.http.waiting import deadline_of, unless_left
from florence2.serve.work.jobs import Answered, Job

_NAMES = {"num_return_sequences": "n", "max_new_tokens": "max_tokens"}


@dataclass(frozen=True)
class Completion:
    """What all parts of one completion have in common."""

    id: str
    created: int
    model: str
    as_json: bool
    logprobs: bool
    about: dict[str, Any]

    def head(self, kind: str) -> dict[str, Any]:
        """Return the fields at the start of every part."""
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def content(self, answer: Answer) -> str:
        """Return an answer as the text of a message."""
        return json.dumps(answer.to_florence(), ensure_ascii=False) if self.as_json else str(answer)

    def extras(self, answer: Answer) -> dict[str, Any]:
        """Return the fields of a message that are not OpenAI's."""
        return {"florence2_result": answer.to_florence(), "florence2": {**answer.to_dict(), **self.about}}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """Return one of the answers."""
        message = {"role": "assistant", "content": self.content(answer), **self.extras(answer)}
        return {
            "index": index,
            "finish_reason": answer.finish_reason,
            "logprobs": logprobs(answer) if self.logprobs else None,
            "message": message,
        }


async def answer_chat(request: Request, tools: Tools) -> Response:
    """Answer a chat. Raises RequestError or a Florence2Error."""
    deadline = deadline_of(request, tools.settings)
    chat = ChatBody.read(await tools.bodies.json(request))
    tools.check_model(chat.model)
    for name in unsupported(chat):
        raise RequestError(
            400, "unsupported_parameter", f"{name} is not supported; Florence-2 answers with text.", param=name
        )
    asked = find_question(chat, tools.service)
    options = _options(chat, tools)
    tools.note_task(request, asked.question, asked.text)
    opened = await tools.images.open(request, asked.image)
    growing = Growing(asyncio.get_running_loop()) if chat.stream and options.width == 1 else None
    job = Job(asked.question, opened.held, options, deadline, growing.hear if growing else None)
    [future] = tools.service.submit([job])
    completion = _completion(chat, asked, tools)
    if chat.stream:
        with_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        parts = _stream(request, completion, job, growing, tools, with_usage)
        return await EventStream.start(request, parts, lambda error: _failure(request, error), future.cancel)
    done = await unless_left(request, asyncio.wrap_future(future))
    tools.note(request, done)
    answers = _answers(done)
    choices = [completion.choice(i, answer) for i, answer in enumerate(answers)]
    body = {**completion.head("chat.completion"), "choices": choices, "usage": usage(done, answers)}
    return JSONResponse(body)


def _options(chat: ChatBody, tools: Tools) -> GenerationOptions:
    given = chat.florence2 or Inputs()
    limits = [given.max_new_tokens, chat.max_completion_tokens, chat.max_tokens]
    changes = {
        "num_beams": given.num_beams,
        "max_new_tokens": next((limit for limit in limits if limit is not None), None),
        "num_return_sequences": given.num_return_sequences or chat.n,
        "confidence": given.confidence,
    }
    return tools.options({name: value for name, value in changes.items() if value is not None}, _NAMES)


def _completion(chat: ChatBody, asked: ChatQuestion, tools: Tools) -> Completion:
    about: dict[str, Any] = {"ignored": ignored(chat)}
    if asked.note is not None:
        about["note"] = asked.note
    as_json = chat.response_format is not None and chat.response_format.type == "json_object"
    name = tools.settings.names[0]
    return Completion(f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), name, as_json, bool(chat.logprobs), about)


def _answers(done: Answered) -> Sequence[Answer]:
    assert done.answer is not None
    return (done.answer, *done.answer.alternatives)


def _failure(request: Request, error: Exception) -> dict[str, Any]:
    return explain(error, str(request.scope.get("florence2.id", ""))).body()


async def _stream(
    request: Request, completion: Completion, job: Job, growing: Growing | None, tools: Tools, with_usage: bool
) -> AsyncIterator[bytes | None]:
    """Yield the events of a streamed completion, and None while nothing happens."""
    head = completion.head("chat.completion.chunk")
    processor, task = tools.service.model.processor, job.question.task if job.question else None
    text_only = task is not None and task.answer == "text" and not completion.as_json
    sent, started = "", False
    async for part in stream_answer(job.future, growing):
        if part is None:
            yield None
            continue
        if isinstance(part, Answered):
            break
        text = whole_text(processor.decode(part, skip_special=True)) if text_only else ""
        if text.startswith(sent) and len(text) > len(sent):
            yield event(_chunk(head, 0, {**({} if started else {"role": "assistant"}), "content": text[len(sent) :]}))
            sent, started = text, True
    assert isinstance(part, Answered)
    tools.note(request, part)
    answers = _answers(part)
    for index, answer in enumerate(answers):
        content = completion.content(answer)
        if index == 0 and content.startswith(sent):
            content = content[len(sent) :]
        delta = {**({} if started and index == 0 else {"role": "assistant"}), "content": content}
        tokens = logprobs(answer) if completion.logprobs else None
        yield event(_chunk(head, index, delta | completion.extras(answer), logprobs=tokens))
        yield event(_chunk(head, index, {}, finish_reason=answer.finish_reason))
    if with_usage:
        yield event({**head, "choices": [], "usage": usage(part, answers)})
    yield b"data: [DONE]\n\n"


def whole_text(text: str) -> str:
    """Return a text that may be half written as far as it stands: without a letter that lacks bytes, and stripped."""
    return text.rstrip("\ufffd").strip()


def _chunk(
    head: dict[str, Any], index: int, delta: dict[str, Any], finish_reason: str | None = None, logprobs: Any = None
) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
    return {**head, "choices": [choice]}


def logprobs(answer: Answer) -> dict[str, Any]:
    """Return the log-probability of each generated token in OpenAI's form."""
    pairs = zip(answer.token_texts[1:], answer.token_logprobs, strict=True)
    content = [
        {"token": text, "logprob": value, "bytes": list(text.encode()), "top_logprobs": []} for text, value in pairs
    ]
    return {"content": content, "refusal": None}


def usage(done: Answered, answers: Sequence[Answer]) -> dict[str, Any]:
    """Return how many tokens a completion took; those of an image that was encoded before are cached ones."""
    prompt = done.prompt_tokens + done.image_tokens
    written = sum(max(0, len(answer.token_ids) - 1) for answer in answers)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": done.image_tokens if done.cached else 0},
    }
