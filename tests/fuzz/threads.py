"""One model in several threads: every answer is that of a single thread, whatever the others do."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random
from typing import Any

from florence2.errors import Florence2Error
from florence2.inputs.tasks import TASKS
from tests.fuzz import material, values
from tests.fuzz.worker import expect


def draw(random: Random) -> list[tuple[str, int, Any, dict[str, Any], str]]:
    """Requests: (task, number of the image, input, settings, how it is asked)."""
    requests = []
    for _ in range(random.randint(4, 12)):
        task = random.choice(list(TASKS.values()))
        given: Any = {"nothing": None, "text": "a red circle", "region": (1, 2, 30, 20)}[task.takes]
        settings: dict[str, Any] = {"num_beams": random.choice((1, 2)), "max_new_tokens": random.randint(1, 6)}
        if random.random() < 0.2:
            settings = {"sample": True, "seed": random.randrange(99), "max_new_tokens": 4}
        if random.random() < 0.2:
            given = values.plain(random)
        requests.append(
            (task.token, random.randrange(5), given, settings, random.choice(("run", "run", "batch", "traced")))
        )
    return requests


def check(case: list[Any], place: Path) -> None:
    alone = [_answer(request) for request in case]
    files = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(_answer, case * 2))
    expect(together == alone * 2, f"{sum(a != b for a, b in zip(together, alone * 2, strict=True))} answers differ")
    expect(len(os.listdir("/proc/self/fd")) <= files, "files are left open")  # noqa: PTH208


def _answer(request: tuple[str, int, Any, dict[str, Any], str]) -> Any:
    """The ids and coordinates of an answer, or the sentence of the refusal."""
    task, number, given, settings, how = request
    f, image = material.model(), material.drawing(number)
    try:
        if how == "batch":
            answer = f.run_batch([(task, image, given), ("<OD>", image)], **settings)[0]
        elif how == "traced":
            with f.trace("decoder.layers.*.cross_attention"):
                answer = f.run(task, image, given, **settings)
        else:
            answer = f.run(task, image, given, **settings)
    except Florence2Error as error:
        return str(error)
    return answer.token_ids, [box.xyxy for box in answer.boxes], answer.text
