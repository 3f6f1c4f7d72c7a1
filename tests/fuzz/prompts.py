"""Calls of the Python interface with tasks, texts, boxes, options and requests of any kind."""

import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from florence2.answers.cascade import Cascade
from florence2.inputs.coordinates import bins_to_pixels, pixels_to_bins
from florence2.inputs.tasks import TASKS, Task, TaskTable, find_task
from tests.fuzz import material, values
from tests.fuzz.answers import check_answer, check_ids, check_shapes
from tests.fuzz.worker import expect

_METHODS = (
    *(
        "run",
        "run",
        "run",
        "run",
        "run",
        "run_batch",
        "run_batch",
        "caption",
        "detect",
        "ground",
        "segment",
        "describe",
    ),
    *("cascade", "prompt", "answer", "bins", "table", "options"),
)
_OPTIONS = (
    *("num_beams", "max_new_tokens", "min_new_tokens", "length_penalty", "early_stopping", "no_repeat_ngram_size"),
    *("repetition_penalty", "num_return_sequences", "forced_bos_token_id", "forced_eos_token_id", "sample"),
    *("temperature", "top_k", "top_p", "seed", "extra_rules", "beams"),
)


def draw(random: Random) -> tuple[str, dict[str, Any]]:
    """(method, arguments)."""
    method = random.choice(_METHODS)
    arguments = {
        "task": _task(random),
        "text": _text(random),
        "box": _box(random) if random.random() < 0.4 else None,
        "settings": _settings(random),
        "other": values.anything(random),
        "size": _size(random),
        "ids": [random.choice((2, 0, 5, 700, 1630, 1631, 2**31, 2**40, -1, "x", None, 1.5, True)) for _ in range(3)]
        if random.random() < 0.3
        else [2, *(random.randrange(1631) for _ in range(random.randint(0, 8)))],
    }
    return method, arguments


def _task(random: Random) -> Any:
    task = random.choice(list(TASKS.values()))
    kind = random.randrange(9)
    if kind < 4:
        return task.token
    if kind == 4:
        return task.alias
    if kind == 5:
        return task.token + values.text(random)
    if kind == 6:
        return random.choice(("<od>", "detect", "<Caption>", "<VQA>how many?", "what is this?", "OD", "<OD", "OD>", ""))
    return values.text(random) if kind == 7 else values.anything(random)


def _text(random: Random) -> Any:
    kind = random.randrange(8)
    if kind < 3:
        return None
    if kind == 3:
        return "".join(
            f"<loc_{random.choice((0, 5, 999, 1000, 10**40))}>" for _ in range(random.choice((3, 4, 4, 4, 5)))
        )
    if kind == 4:
        return values.text(random)
    if kind == 5:
        return [values.text(random) for _ in range(random.randint(0, 3))]
    if kind == 6:
        return values.text(random) * random.choice((10, 1000))
    return _box(random)


def _box(random: Random) -> Any:
    good = [random.randint(0, 20), random.randint(0, 20), random.randint(21, 60), random.randint(21, 60)]
    kind = random.randrange(12)
    if kind < 4:
        return random.choice((tuple, list))(good)
    if kind == 4:
        return np.array(good, random.choice(("float32", "int64", "float16", "uint8", "object", "bool", "complex64")))
    if kind == 5:
        return torch.tensor(good, dtype=random.choice((torch.float32, torch.int64, torch.bfloat16)))
    if kind == 6:
        return bytes(good)
    if kind == 7:
        return [values.number(random) if random.random() < 0.4 else value for value in good]
    if kind == 8:
        return good[: random.randint(0, 3)] if random.random() < 0.5 else good + good
    if kind == 9:
        return random.choice(
            (good[::-1], [good], np.array([good]), dict.fromkeys(good), set(good), "1,2,3,4", iter(good))
        )
    return values.anything(random)


def _settings(random: Random) -> Any:
    few = {"num_beams": random.choice((1, 1, 2, 3)), "max_new_tokens": random.randint(1, 6)}
    if random.random() < 0.6:
        return few
    return few | {
        random.choice(_OPTIONS): random.choice((values.anything(random), random.randint(0, 6))) for _ in range(2)
    }


def _size(random: Random) -> Any:
    return (random.randint(1, 99), random.randint(1, 99)) if random.random() < 0.7 else values.anything(random)


def check(case: tuple[str, dict[str, Any]], place: Path) -> None:
    method, given = case
    globals()[f"_check_{method}"](**given)


def _check_run(task: Any, text: Any, box: Any, settings: Any, **_: Any) -> None:
    f = material.model()
    answer = f.run(task, material.drawing(3), text, box=box, **settings)
    check_answer(answer, f)
    found = find_task(task)
    region = box if text is None else text
    if found is not None and found.takes == "region" and region is not None and not isinstance(region, str):
        expect(not isinstance(region, bytes | bytearray | dict | set | frozenset), f"{region!r} was taken for a box")
        text = [float(value) for value in region]
    named = re.match(r"<[A-Za-z]\w*>", task)
    known = named is not None and f.processor.tokenizer.token_id(named[0]) is not None
    expect(not named or found is not None or known, f"{task!r} was taken for a free prompt")
    options = f.options(**settings)
    if not options.sample and options.width * options.max_new_tokens <= 12 and not options.extra_rules:
        prompt = f.processor.prompt(task, text, (48, 32))
        check_ids(f, answer, f.processor.image(material.drawing(3)), prompt, options)


def _check_run_batch(task: Any, text: Any, settings: Any, other: Any, ids: Any, **_: Any) -> None:
    f = material.model()
    plain = ("<OD>", material.drawing(5))
    requests: Any = [(task, material.drawing(4), text), plain, (task, material.drawing(5), text)]
    if len(ids) % 3 == 0:
        requests = other
    elif len(ids) % 3 == 1:
        settings = {**settings, "batch_size": len(ids)}
    answers = f.run_batch(requests, **settings)
    for answer in answers:
        check_answer(answer, f)
    if requests is other:
        expect(not answers, f"{other!r} was answered")
    elif not f.options(**{k: v for k, v in settings.items() if k != "batch_size"}).sample:
        alone = f.run(*plain, **{k: v for k, v in settings.items() if k != "batch_size"})
        expect(alone.token_ids == answers[1].token_ids, "a batch changes the answer")


def _check_caption(settings: Any, other: Any, ids: Any, **_: Any) -> None:
    detail = _detail(other, ids)
    check_answer(material.model().caption(material.drawing(1), detail, **settings), material.model())


def _detail(other: Any, ids: Any) -> Any:
    """A detail that exists, half of the time."""
    return ("short", "detailed", "more_detailed")[len(ids) % 3] if len(ids) % 2 else other


def _check_detect(text: Any, settings: Any, **_: Any) -> None:
    check_answer(material.model().detect(material.drawing(1), text, **settings), material.model())


def _check_ground(text: Any, settings: Any, **_: Any) -> None:
    check_answer(material.model().ground(material.drawing(1), text, **settings), material.model())


def _check_segment(text: Any, box: Any, settings: Any, **_: Any) -> None:
    check_answer(material.model().segment(material.drawing(1), text, box=box, **settings), material.model())


def _check_describe(box: Any, settings: Any, **_: Any) -> None:
    check_answer(material.model().describe(material.drawing(1), box, **settings), material.model())


def _check_cascade(settings: Any, other: Any, ids: Any, **_: Any) -> None:
    settings = {**settings, "max_new_tokens": len(ids)}
    cascade = material.model().cascade(material.drawing(1), _detail(other, ids), **settings)
    expect(isinstance(cascade, Cascade), "a cascade")
    check_answer(cascade.caption, material.model())
    str(cascade)


def _check_prompt(task: Any, text: Any, size: Any, **_: Any) -> None:
    f = material.model()
    ids = f.processor.prompt(task, text, size)
    expect(ids[0] == 0 and ids[-1] == 2 and all(0 <= id < 1631 for id in ids), f"prompt ids {ids}")


def _check_answer(task: Any, text: Any, size: Any, ids: Any, other: Any, **_: Any) -> None:
    f = material.model()
    image_size = size if size is not None else (48, 32)
    if text is None:
        logprobs = [-0.5] * (len(ids) - 1) if len(ids) % 2 else ()
        answer = f.processor.answer(task, token_ids=ids, image_size=image_size, token_logprobs=logprobs)
        expect(all(type(id) is int and 0 <= id < 1 << 32 for id in answer.token_ids), f"ids {answer.token_ids}")
    else:
        answer = f.processor.answer(task, text, image_size=image_size)
    check_shapes(answer)


def _check_bins(box: Any, size: Any, other: Any, **_: Any) -> None:
    rows = other if box is None else box
    bins = pixels_to_bins(rows, size)
    flat = np.array(bins).ravel()
    expect(all(0 <= bin <= 999 for bin in flat), f"bins {bins}")
    pixels = np.array(bins_to_pixels(bins, size), float)
    expect(np.isfinite(pixels).all(), f"pixels {pixels}")


def _check_table(task: Any, text: Any, other: Any, **_: Any) -> None:
    table = TaskTable([Task(task, text, other)] if text is not None else other)
    expect(all(isinstance(token, str) for token in table), "tokens are texts")


def _check_options(settings: Any, other: Any, **_: Any) -> None:
    options = material.model().options(**settings)
    options.to_dict()
    check_answer(material.model().run("<OD>", material.drawing(2), options=options), material.model())
    check_answer(material.model().run("<OD>", material.drawing(2), options=other, max_new_tokens=2), material.model())
    expect(other is None, f"options={other!r} was taken")
