"""Compare a live reference and this project on the same checkpoint, stage by stage."""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence2.answers.answer import parse_answer
from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.config_files import read_image_config
from florence2.checkpoints.hub import resolve
from florence2.fast.install import install
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation
from florence2.inputs.coordinates import pixels_to_bins
from florence2.inputs.image import image_to_array, open_image
from florence2.inputs.tasks import TASKS, build_sentence, split_prompt
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.florence2 import Florence2Model
from parity.attentions import compare_inside
from parity.cases import IMAGES, PIXEL_IMAGES, PROMPTS, SETTINGS, SyntheticModel, random_text
from parity.gradients import compare_gradients, make_batch
from parity.recipe import make_checkpoint, make_picture
from parity.references import Native, Reference, Remote
from parity.report import Comparison, largest_difference
from parity.ties import TokenCount

MakeReference = Callable[[Path, Florence2Model, torch.dtype], Reference]
"""A function of checkpoint folder, our model of it and dtype that loads the reference."""

_DECODER_IDS = [2, 0, 713, 16, 10, 50286, 51268, 11, 5, 2274]
_LABELS = [0, 713, 16, 10, 50286, 11, 5, 2, -100, -100]


@dataclass(frozen=True)
class Work:
    """The cases to run on one checkpoint."""

    prompts: Sequence[str] = tuple(PROMPTS)
    images: Sequence[Any] = tuple(IMAGES)
    settings: Sequence[dict[str, Any]] = tuple(SETTINGS)
    rounded_gradients: bool = True
    """Compare gradients in float32 too. In a deep model with synthetic weights, an attention may put all its
    weight on one position; the gradient before it is then pure rounding, on both sides."""
    training_side: int = 768
    """Images are cropped to this many pixels a side for gradients, which keep the activations of every layer."""


def compare_shape(group: str, shape: SyntheticModel, make_reference: MakeReference, work: Work) -> Iterator[Comparison]:
    """Make the synthetic checkpoint and compare on it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, shape.config, shape.seed, shape.end_bonus, shape.size)
        yield from compare_checkpoint(group, shape.name, folder, make_reference, work)


def compare_checkpoint(
    group: str, subject: str, folder: Path, make_reference: MakeReference, work: Work
) -> Iterator[Comparison]:
    """Compare numbers in float64, where only a wrong formula makes a difference, and tokens in float32.

    The native loss and the remote code's logits pass through float32 once even in float64. Their tolerances, and those
    of the gradients, are those of this rounding.
    """
    pixels = [_pixel_values(image, folder) for image in work.images]
    tokenizer = FlorenceTokenizer(folder / "tokenizer.json")
    prompts = [tokenizer.encode(build_sentence(*split_prompt(prompt))) for prompt in work.prompts]
    ours = install(load_model(folder, dtype=torch.float64))
    reference = make_reference(folder, ours, torch.float64)
    subject = f"{subject} / {reference.name}"
    yield from _compare_numbers(group, subject, ours, reference, pixels, prompts)
    if isinstance(reference, Native):
        yield from compare_inside(group, subject, ours, reference, pixels[:1], prompts, _DECODER_IDS)
    cut = [values[..., : work.training_side, : work.training_side] for values in pixels]
    batch = make_batch(cut, prompts, padded=not reference.attends_to_padding)
    yield from compare_gradients(group, subject, ours, reference, batch)
    ours = install(load_model(folder))
    reference = make_reference(folder, ours, torch.float32)
    if work.rounded_gradients:
        yield from compare_gradients(group, subject, ours, reference, batch)
    yield from _compare_search(group, subject, ours, reference, pixels, prompts, work.settings)


def compare_inside_specimen(group: str, make_reference: MakeReference) -> Iterator[Comparison]:
    """Compare what happens inside nano, whose weights are trained, unlike those of the synthetic models."""
    folder = resolve("nano")
    ours, tokenizer = load_model(folder, dtype=torch.float64), FlorenceTokenizer(folder / "tokenizer.json")
    reference = make_reference(folder, ours, torch.float64)
    if isinstance(reference, Native):
        prompts = [tokenizer.encode(build_sentence(*split_prompt(prompt))) for prompt in ("<OD>", "<CAPTION>")]
        decoder_ids = [2, *tokenizer.encode("red circle<loc_41><loc_552><loc_140><loc_706>square<loc_9>")[:-1]]
        pixels = [_pixel_values(image, folder) for image in IMAGES]
        yield from compare_inside(
            group, f"the specimen / {reference.name}", ours, reference, pixels, prompts, decoder_ids
        )


def compare_text(group: str, folder: Path, reference: Reference, count: int = 2000) -> Iterator[Comparison]:
    """Compare tokenizer, prompts and pixels, and with the remote code also answers and coordinates."""
    rng, tokenizer = random.Random(7), FlorenceTokenizer(folder / "tokenizer.json")
    subject = reference.name
    texts = [random_text(rng) for _ in range(count)]
    encoded = [tokenizer.encode(text) for text in texts]
    equal = sum(reference.tokenize(text) == ids for text, ids in zip(texts, encoded, strict=True))
    yield Comparison(group, subject, "tokenizer, random texts", equal, count)
    both = [(ids, skip) for ids in encoded[:500] for skip in (False, True)]
    equal = sum(reference.detokenize(ids, skip) == tokenizer.decode(ids, skip) for ids, skip in both)
    yield Comparison(group, subject, "detokenizer", equal, len(both))
    prompts = [task.token + ("" if task.takes == "nothing" else "a car<loc_1>") for task in list(TASKS.values())[:15]]
    equal = sum(reference.sentence(prompt) == build_sentence(*split_prompt(prompt)) for prompt in prompts)
    yield Comparison(group, subject, "prompts", equal, len(prompts))
    equal = 0
    for case in PIXEL_IMAGES:
        image = make_picture(*case)
        ours = torch.from_numpy(image_to_array(open_image(image), read_image_config(folder)))
        equal += torch.equal(ours, reference.pixels(image.convert("RGB")))
    yield Comparison(group, subject, "pixels, bit for bit", equal, len(PIXEL_IMAGES))
    if isinstance(reference, Remote):
        yield from _compare_answers(group, subject, reference, tokenizer, texts)


def _compare_answers(
    group: str, subject: str, reference: Remote, tokenizer: FlorenceTokenizer, texts: Sequence[str]
) -> Iterator[Comparison]:
    rng, equal, total = random.Random(8), 0, 0
    for text in texts:
        task, size = rng.choice(list(TASKS.values())[:15]), (rng.choice([1, 333, 1920]), rng.choice([1, 517, 1080]))
        ours = parse_answer(task.token, task.answer, text, size).to_florence()
        equal, total = equal + (ours == reference.answer(task.token, text, size)), total + 1
    yield Comparison(group, subject, "answers, random texts", equal, total)
    equal = total = 0
    worst = 0.0
    for text in texts:
        task, ids = TASKS[rng.choice(["<OD>", "<DENSE_REGION_CAPTION>"])], [2, *tokenizer.encode(text)[1:-1]]
        logprobs = [-2 * rng.random() for _ in ids[1:]]
        if len(ids) < 2:
            continue
        pieces = tokenizer.token_texts(ids)
        ours = parse_answer(
            task.token,
            task.answer,
            tokenizer.decode(ids),
            (640, 480),
            token_ids=ids,
            token_logprobs=logprobs,
            token_texts=pieces,
        ).to_florence()[task.token]
        theirs = reference.scored_answer(task.token, ids, logprobs, (640, 480))[task.token]
        scores = ours.pop("scores", []), theirs.pop("scores", [])
        same = ours == theirs and len(scores[0]) == len(scores[1])
        equal, total = equal + same, total + 1
        worst = max([worst, *(abs(a - b) for a, b in zip(*scores, strict=False))]) if same else worst
    yield Comparison(group, subject, "answers with scores", equal, total, worst)
    equal, generator = 0, torch.Generator().manual_seed(9)
    sizes = [(640, 480), (333, 517), (1, 1080), (1920, 1), (4000, 3000)]
    for size in sizes:
        boxes = torch.rand(400, 4, generator=generator) * 1.1 * torch.tensor([*size, *size])
        equal += pixels_to_bins(boxes.numpy(), size) == reference.pixels_to_bins(boxes, size).tolist()
    yield Comparison(group, subject, "coordinates to bins, 400 boxes each", equal, len(sizes))


def _compare_numbers(
    group: str,
    subject: str,
    ours: Florence2Model,
    reference: Reference,
    pixels: Sequence[Tensor],
    prompts: Sequence[list[int]],
) -> Iterator[Comparison]:
    worst = dict.fromkeys(("features", "encoder", "logits", "loss"), 0.0)

    def note(stage: str, mine: Any, theirs: Any) -> None:
        worst[stage] = max(worst[stage], largest_difference(mine, theirs))

    with torch.no_grad():
        for pixel_values in pixels:
            features = ours.encode_image(pixel_values)
            note("features", features, reference.features(pixel_values))
            for ids in prompts:
                prompt = torch.tensor([ids])
                memory = ours.encode(features, prompt)
                note("encoder", memory, reference.encode(pixel_values, ids))
                logits = ours.decode(torch.tensor([_DECODER_IDS]), memory)
                note("logits", logits, reference.logits(pixel_values, ids, _DECODER_IDS))
                loss = float(ours.loss(pixel_values, prompt, torch.tensor([_LABELS])))
                note("loss", loss, reference.loss(pixel_values, ids, _LABELS))
    for stage, difference in worst.items():
        total = len(pixels) * (1 if stage == "features" else len(prompts))
        yield Comparison(group, subject, f"{stage}, float64", total, total, difference)


def _compare_search(
    group: str,
    subject: str,
    ours: Florence2Model,
    reference: Reference,
    pixels: Sequence[Tensor],
    prompts: Sequence[list[int]],
    settings: Sequence[dict[str, Any]],
) -> Iterator[Comparison]:
    defaults = GenerationOptions.from_settings(ours.config.generation)
    count, scored, tokens = TokenCount(), 0, 0
    worst, notes = 0.0, []
    for pixel_values in pixels:
        with torch.no_grad():
            features = ours.encode_image(pixel_values)
        for ids in prompts:
            encode = partial(ours.encode, features, torch.tensor([ids]))
            with torch.no_grad():
                memory = encode()
            for changes in settings:
                options = defaults.changed(**changes)
                generation = generate(ours, memory, options)
                sequences, logprobs, scores = reference.generate(pixel_values, ids, options)
                tokens += int(generation.lengths.sum())
                if count.add(ours, encode, generation.sequences.tolist(), sequences):
                    scored += 1
                    worst = max(worst, _score_difference(generation, logprobs, scores))
                else:
                    notes.append(f"{changes}: {_first_difference(generation.sequences.tolist(), sequences)}")
    stage = f"tokens, {len(settings)} settings"
    note = "; ".join([f"({tokens:,} tokens)", *notes])
    yield Comparison(group, subject, stage, count.equal, count.total, note=note, ties=count.ties)
    yield Comparison(group, subject, "log-probabilities and scores", scored, scored, worst)


def _score_difference(generation: Generation, logprobs: list[list[float]], scores: list[float] | None) -> float:
    difference = largest_difference(generation.token_logprobs, logprobs)
    if scores is None:
        return difference
    # a small length penalty leaves large sums, where float32 has a larger absolute rounding error
    scale = max(1.0, *map(abs, scores))
    return max(difference, largest_difference(generation.sequence_scores, scores) / scale)


def _first_difference(ours: list[list[int]], theirs: list[list[int]]) -> str:
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        for position, (a, b) in enumerate(zip(mine, other, strict=False)):
            if a != b:
                return f"row {row}, position {position}: {a}, reference {b}"
    return f"lengths {[len(r) for r in ours]}, reference {[len(r) for r in theirs]}"


def _pixel_values(case: Any, folder: Path) -> Tensor:
    image = make_picture(*case) if isinstance(case, tuple) else case
    return torch.from_numpy(image_to_array(open_image(image), read_image_config(folder)))
