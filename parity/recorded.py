"""`python -m parity --device cuda`: what a device replays from recordings, against the plain way, before any timing.

On a device without CUDA graphs, tapes stand in for them (see `parity.tape`). Each comparison counts what is equal.
"""

import copy
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from florence2.checkpoints.hub import EMBEDDED_MODEL
from florence2.fast.cuda.recorded.graphs import (
    Recorder,
    RecordingError,
    kept_bytes,
    record_cuda_graph,
    record_with,
    recordings,
)
from florence2.generation.engine.engine import Engine, Work
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.loading import load
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from parity.report import Comparison
from parity.schedules import SETTINGS, answer_alone, compare_schedules, encode_question, make_questions
from parity.tape import TapeRecorder
from parity.ties import TokenCount

_SIDE = 192  # pixels of an image
_CLOSE = 1e-4  # features, about 1, may differ by this in float32, and large ones by 10 times this part of them
_REPEATS = 3  # plainly, while it is recorded, and by replay
_LENGTHS = 200


class _Counting:
    """A recorder that counts its recordings, and those that failed: then the plain way answers, and all is equal."""

    def __init__(self, record: Recorder):
        self._record, self.recorded, self.failed = record, 0, 0

    def __call__(self, work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        self.recorded += 1
        try:
            return self._record(work, device)
        except RecordingError:
            self.failed += 1
            raise


def compare_recorded(device: torch.device, schedules: int) -> Iterator[Comparison]:
    """Compare images, prompts, answers and schedules of nano in float32, and what happens when the model changes."""
    f, on_cpu = load(EMBEDDED_MODEL, device=str(device)), load(EMBEDDED_MODEL, device="cpu")
    recorder = _Counting(record_cuda_graph if device.type == "cuda" else TapeRecorder())
    row = partial(Comparison, "device", f"nano on {device} / the plain way")
    with record_with(recorder), torch.no_grad():
        yield row("images, recorded", *_compare(f.model, _images(f.model)))
        yield row("prompts, recorded", *_compare(f.model, _prompts(f.model)))
        yield row("other weights in place", *_compare_changed(f.model, lambda part: part.weight.mul_(-2)))
        yield row("a swapped module", *_compare_changed(f.model, _swap))
        yield row("a hook", *_compare_changed(f.model, lambda part: part.register_forward_hook(lambda *got: -got[2])))
    count = _compare_answers(f, on_cpu, recorder)
    yield row("tokens, every setting, recorded", count.equal, count.total, ties=count.ties)
    count = _compare_threads(f, on_cpu, recorder)
    yield row("tokens, three threads, recorded", count.equal, count.total, ties=count.ties)
    yield compare_schedules(schedules, recorder=recorder, model=f.model)
    with record_with(recorder):
        yield row("prompt lengths that record nothing", *_count_lengths(f, recorder))
    yield row("recordings that succeed", recorder.recorded - recorder.failed, recorder.recorded)
    kept, limit = recordings(f.model), kept_bytes(device)
    note = f"{len(kept)} recordings of {kept.size >> 20} MiB kept, limit {limit >> 20} MiB; {recorder.recorded} made"
    yield row("bytes of what is kept", int(kept.size <= limit), 1, note=note)


Case = Callable[[Florence2Model], Tensor]


def _images(model: Florence2Model) -> list[Case]:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(count, 3, _SIDE, _SIDE, generator=generator) for count in (1, 2, 3, 5, 8, 11)]
    return [partial(_encode_image, pixel_values=each.to(model.device)) for each in batches]


def _encode_image(model: Florence2Model, pixel_values: Tensor) -> Tensor:
    return model.encode_image(pixel_values)


def _prompts(model: Florence2Model) -> list[Case]:
    generator = torch.Generator().manual_seed(1)
    cases: list[Case] = []
    for count, length in ((1, 3), (1, 40), (2, 9), (3, 130), (8, 17), (11, 5)):
        features = torch.randn(count, 37, model.config.text.d_model, generator=generator)
        ids = torch.randint(4, 600, (count, length), generator=generator)
        mask = torch.arange(length) < torch.randint(1, 1 + length, (count, 1), generator=generator)
        given = features.to(model.device), ids.to(model.device), mask.to(model.device)
        cases.append(partial(_encode, given=given))
    return cases


def _encode(model: Florence2Model, given: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    memory = model.encode(*given)
    return memory[model.memory_mask(given[0], given[2])]  # padding is not compared


def _compare(model: Florence2Model, cases: list[Case]) -> tuple[int, int, None, str]:
    """Run each case several times; return how often the plain way gives about the same, of how many, and a note."""
    equal, worst = 0, 0.0
    for case in cases:
        with record_with(None):
            expected = case(model)
        for _ in range(_REPEATS):
            found = case(model)
            equal += _are_close(found, expected)
            worst = max(worst, float((found - expected).abs().max()))
    return equal, _REPEATS * len(cases), None, f"largest difference {worst:.1e}"


def _are_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, atol=_CLOSE, rtol=10 * _CLOSE)


def _compare_changed(model: Florence2Model, change: Callable[[Any], object]) -> tuple[int, int, None, str]:
    """Change a copy of the model after its stages were recorded; compare, and require that something has changed."""
    changed = copy.deepcopy(model)
    prompt = _prompts(changed)[2]
    cases: list[Case] = [_images(changed)[1], prompt, partial(_answer, given=prompt)]
    before: list[Tensor] = []
    for _ in range(_REPEATS):
        before = [case(changed) for case in cases]
    tower, text = changed.vision_tower, changed.language_model
    parts: list[Any] = [tower.blocks[0][0].spatial_block.ffn.fc1, text.encoder.layers[0].fc1]  # type: ignore[index]
    for part in (*parts, text.decoder.layers[0].fc1):
        change(part)
    differ = sum(not _are_close(case(changed), old) for case, old in zip(cases, before, strict=True))
    equal, total, _, note = _compare(changed, cases)
    return equal + differ, total + len(cases), None, note


def _answer(model: Florence2Model, given: Case) -> Tensor:
    """Return the summed log-probabilities of answers of one length."""
    options = GenerationOptions.from_settings(model.config.generation).changed(max_new_tokens=12, min_new_tokens=11)
    return generate(model, given(model)[None], options).token_logprobs.cumsum(dim=1)


def _swap(part: Any) -> None:
    part.weight = nn.Parameter(part.weight.flip(0))


def _compare_answers(f: Florence2, on_cpu: Florence2, recorder: Recorder) -> TokenCount:
    """Answer questions of all tasks and settings one by one, repeatedly, and compare with a CPU's plain answers."""
    count = TokenCount()
    for question in make_questions(on_cpu, random.Random(0), 6 * len(SETTINGS)):
        for _ in range(_REPEATS):
            with record_with(recorder):
                rows = answer_alone(f, question.work)
            count.add(on_cpu.model, partial(encode_question, on_cpu, question.work), rows, question.alone)
    return count


def _compare_threads(f: Florence2, on_cpu: Florence2, recorder: Recorder) -> TokenCount:
    """Let three threads answer questions at once."""
    questions = make_questions(on_cpu, random.Random(1), 3 * len(SETTINGS))
    found: dict[int, list[list[int]]] = {}

    def answer(numbers: range) -> None:
        with record_with(recorder):
            for number in numbers:
                found[number] = answer_alone(f, questions[number].work)

    with ThreadPoolExecutor(3) as threads:
        list(threads.map(answer, (range(start, len(questions), 3) for start in range(3))))
    count = TokenCount()
    for number, question in enumerate(questions):
        encode = partial(encode_question, on_cpu, question.work)
        count.add(on_cpu.model, encode, found[number], question.alone)
    return count


def _count_lengths(f: Florence2, recorder: "_Counting") -> tuple[int, int]:
    """Ask questions of every length; return how many recorded nothing, once each bucket has been seen, and of all."""
    generator, engine = torch.Generator().manual_seed(2), Engine(f.model)
    features = torch.randn(1, 37, f.model.config.text.d_model, generator=generator)
    options = f.options(max_new_tokens=3, min_new_tokens=2)

    def ask(length: int) -> int:
        before, prompt = recorder.recorded, torch.randint(4, 600, (length,), generator=generator)
        engine.submit(Work(prompt.tolist(), options, features=features))
        while engine.busy:
            engine.step()
        return recorder.recorded - before

    for length in [*range(1, 1 + _LENGTHS, 50), _LENGTHS] * 2:
        ask(length)
    return sum(ask(length) == 0 for length in range(1, 1 + _LENGTHS)), _LENGTHS
