"""The engine answers as `generate` alone does, whatever joins, leaves or is cancelled meanwhile."""

import contextlib
import random
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from florence2.checkpoints.hub import EMBEDDED_MODEL
from florence2.fast.cuda.recorded.graphs import Recorder, record_with
from florence2.generation.engine.engine import Engine, Ticket, Work
from florence2.generation.generate import generate
from florence2.loading import load
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from parity.report import Comparison
from parity.ties import TokenCount
from recipes.nano.exam import Exam

SCENES_SEED, SCENES = 4, 8
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"num_beams": 1, "max_new_tokens": 40},
    {"max_new_tokens": 7},
    {"num_beams": 3, "max_new_tokens": 30, "early_stopping": False, "num_return_sequences": 2},
    {"num_beams": 5, "max_new_tokens": 24, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 2, "max_new_tokens": 24, "min_new_tokens": 8, "no_repeat_ngram_size": 2, "repetition_penalty": 1.2},
    {"sample": True, "seed": 7, "num_return_sequences": 2, "max_new_tokens": 20},
)


@dataclass
class Question:
    """A question, and its rows of ids when it is asked alone."""

    work: Work
    alone: list[list[int]]


def make_questions(f: Florence2, rng: random.Random, count: int) -> list[Question]:
    """Draw questions about synthetic scenes, of all tasks and settings, and answer each alone."""
    exam, questions = Exam(SCENES_SEED, SCENES), []
    images = [f.encode_image(exam[i].image).features for i in range(SCENES)]
    asked = [(i, prefix) for i in range(SCENES) for prefix, _ in exam[i].pairs]
    rng.shuffle(asked)
    for number, (i, prefix) in enumerate(asked[:count]):
        options = f.options(**SETTINGS[number % len(SETTINGS)])
        work = Work(f.processor.prompt(prefix), options, features=images[i])
        questions.append(Question(work, answer_alone(f, work)))
    return questions


@torch.no_grad()
def answer_alone(f: Florence2, work: Work) -> list[list[int]]:
    """Return the rows of ids that `generate` gives."""
    rows: list[list[int]] = generate(f.model, encode_question(f, work), work.options).sequences.tolist()
    return rows


def encode_question(f: Florence2, work: Work) -> Tensor:
    """Return the memory (1, S, D) of a question with features."""
    assert work.features is not None
    prompt = torch.tensor([list(work.prompt)], device=f.model.device)
    return f.model.encode(work.features.to(f.model.device), prompt)


def run_schedule(
    f: Florence2,
    questions: list[Question],
    rng: random.Random,
    count: TokenCount,
    model: Florence2Model | None = None,
) -> None:
    """Submit and cancel at random steps, and count the answers that equal their own alone.

    `model` answers in the place of `f`, for example on another device; f then tells ties from differences.
    Raises AssertionError when a question is answered twice, not at all, or after it was cancelled.
    """
    engine = Engine(model or f.model, slots=rng.randint(1, 5), decoding_share=rng.choice([0.0, 0.5]))
    coming = [rng.choice(questions) for _ in range(rng.randint(2, 10))]
    asked: dict[Ticket, Question] = {}
    answered: set[Ticket] = set()
    while coming or engine.busy:
        while coming and rng.random() < 0.4:
            question = coming.pop()
            asked[engine.submit(question.work)] = question
        if asked and rng.random() < 0.02:
            engine.cancel(rng.choice(list(asked)))
        for done in engine.step():
            assert done.ticket not in answered and not done.ticket.cancelled and done.generation is not None
            answered.add(done.ticket)
            question = asked[done.ticket]
            encode = partial(encode_question, f, question.work)
            count.add(f.model, encode, done.generation.sequences.tolist(), question.alone)
    assert all(ticket in answered or ticket.cancelled for ticket in asked)


def compare_schedules(
    schedules: int,
    seed: int = 0,
    questions: int = 84,
    recorder: Recorder | None = None,
    model: Florence2Model | None = None,
) -> Comparison:
    """Compare the answers of random schedules with those of each question alone, the plain way on a CPU.

    With a `recorder`, the schedules replay what it recorded, as they do on a CUDA device. `model` is as in
    `run_schedule`.
    """
    rng, f, count = random.Random(seed), load(EMBEDDED_MODEL, device="cpu"), TokenCount()
    known = make_questions(f, rng, questions)
    with contextlib.nullcontext() if recorder is None else record_with(recorder):
        for _ in range(schedules):
            run_schedule(f, known, rng, count, model)
    stage = f"tokens, {schedules} schedules of the engine{'' if recorder is None else ', recorded'}"
    return Comparison("records", "nano, shipped / itself", stage, count.equal, count.total, ties=count.ties)
