"""Answers of a server under load against those of the library."""

from concurrent.futures import ThreadPoolExecutor
from random import Random
from typing import Any

import florence2
from tests.serve.server import RunningServer, native_body, png

TEXT = "a red triangle and a black word"


def disagreements(
    server: RunningServer, model: florence2.Florence2, requests: int, clients: int, images: int, seed: int
) -> list[str]:
    """Ask at random from many clients; return a line for each answer that is not the library's."""
    rng = Random(seed)
    files = [png(10_000 * seed + i, rng.randrange(60, 400), rng.randrange(60, 400)) for i in range(images)]
    asked = [_question(rng, files) for _ in range(requests)]
    with ThreadPoolExecutor(clients) as threads:
        got = list(threads.map(lambda each: _ask(server, files[each[0]], *each[1:]), asked))
    known: dict[str, dict[str, Any]] = {}
    lines = []
    for question, answer in zip(asked, got, strict=True):
        right = known.get(repr(question))
        if right is None:
            right = known[repr(question)] = _alone(model, files[question[0]], *question[1:])
        if difference := _difference(right, answer):
            lines.append(f"{question}: {difference}")
    return lines


def _question(rng: Random, files: list[bytes]) -> tuple[int, dict[str, Any], dict[str, Any]]:
    task = rng.choice(list(florence2.TASKS.values()))
    fields: dict[str, Any] = {"task": task.token}
    if task.takes == "text":
        fields["text"] = TEXT
    elif task.takes == "region":
        fields["box"] = [5, 6, 50, 55]
    options = rng.choice([{}, {}, {"num_beams": 1}, {"num_beams": 2, "max_new_tokens": 12}])
    # nano writes without end about some images
    return rng.randrange(len(files)), fields, {"max_new_tokens": 40, **options}


def _ask(server: RunningServer, image: bytes, task: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    reply = server.post("/v1/florence2", native_body(image, task, options=options))
    assert reply.status == 200, reply.body
    answer: dict[str, Any] = reply.json["answers"][0]
    return answer


def _alone(model: florence2.Florence2, image: bytes, task: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    answer = model.run(task["task"], image, task.get("text"), box=task.get("box"), **options)
    return {**answer.to_dict(), "florence2_result": answer.to_florence()}


def _difference(right: Any, got: Any, path: str = "") -> str:
    """Say where two answers differ: numbers by more than 1e-4, anything else at all."""
    if isinstance(right, dict) and isinstance(got, dict):
        if right.keys() != got.keys():
            return f"{path}: {sorted(right)} and {sorted(got)}"
        return next((found for key in right if (found := _difference(right[key], got[key], f"{path}.{key}"))), "")
    if isinstance(right, list) and isinstance(got, list) and len(right) == len(got):
        pairs = enumerate(zip(right, got, strict=True))
        return next((found for i, (a, b) in pairs if (found := _difference(a, b, f"{path}[{i}]"))), "")
    if isinstance(right, float) and isinstance(got, float):
        return "" if abs(right - got) <= 1e-4 else f"{path}: {right} and {got}"
    return "" if right == got else f"{path}: {right!r} and {got!r}"
