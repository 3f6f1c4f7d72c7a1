"""A live reference and this project on the same checkpoint, stage by stage."""

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence2.answers.answer import parse_answer
from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.config_files import read_image_config
from florence2.checkpoints.hub import resolve
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.generation.state import Generation
from florence2.inputs.coordinates import pixels_to_bins
from florence2.inputs.image import image_to_array, open_image
from florence2.inputs.tasks import TASKS, build_sentence, split_prompt
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.florence2 import Florence2Model
from parity.attentions import compare_inside
from parity.cases import PICTURES, PIXEL_PICTURES, PROMPTS, SETTINGS, Shape, random_text
from parity.gradients import compare_gradients, make_batch
from parity.recipe import make_checkpoint, make_picture
from parity.references import Native, Reference, Remote
from parity.report import Row, largest_difference

MakeReference = Callable[[Path, Florence2Model, torch.dtype], Reference]
"""(checkpoint folder, our model of it, type) -> the reference on it."""

_DECODER_IDS = [2, 0, 713, 16, 10, 50286, 51268, 11, 5, 2274]
_LABELS = [0, 713, 16, 10, 50286, 11, 5, 2, -100, -100]


@dataclass(frozen=True)
class Work:
    """What is run on one checkpoint."""

    prompts: Sequence[str] = tuple(PROMPTS)
    pictures: Sequence[Any] = tuple(PICTURES)
    settings: Sequence[dict[str, Any]] = tuple(SETTINGS)
    rounded_gradients: bool = True
    """Whether gradients are compared in float32 too. Where a deep model with made-up weights has an attention that
    looks at one place only, the gradient before it is all rounding, on either side."""
    training_side: int = 768
    """Pictures are cut to this many pixels a side where gradients are compared, which keep every layer in memory."""


def compare_shape(group: str, shape: Shape, make_reference: MakeReference, work: Work) -> Iterator[Row]:
    """Make a checkpoint of `shape` and compare on it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_checkpoint(folder, shape.config, shape.seed, shape.end_bonus, shape.size)
        yield from compare_checkpoint(group, shape.name, folder, make_reference, work)


def compare_checkpoint(
    group: str, subject: str, folder: Path, make_reference: MakeReference, work: Work
) -> Iterator[Row]:
    """Numbers in float64, where only a wrong formula makes a difference; tokens in float32, as people use it.

    (In float64 too the native loss, and the logits of the remote code, pass through float32 once: their tolerances
    are those of that rounding, and so are those of the gradients.)
    """
    pixels = [_pixel_values(picture, folder) for picture in work.pictures]
    tokenizer = FlorenceTokenizer(folder / "tokenizer.json")
    prompts = [tokenizer.encode(build_sentence(*split_prompt(prompt))) for prompt in work.prompts]
    ours = load_model(folder, dtype=torch.float64)
    reference = make_reference(folder, ours, torch.float64)
    subject = f"{subject} / {reference.name}"
    yield from _compare_numbers(group, subject, ours, reference, pixels, prompts)
    if isinstance(reference, Native):
        yield from compare_inside(group, subject, ours, reference, pixels[:1], prompts, _DECODER_IDS)
    cut = [values[..., : work.training_side, : work.training_side] for values in pixels]
    batch = make_batch(cut, prompts, padded=not reference.attends_to_padding)
    yield from compare_gradients(group, subject, ours, reference, batch)
    ours = load_model(folder)
    reference = make_reference(folder, ours, torch.float32)
    if work.rounded_gradients:
        yield from compare_gradients(group, subject, ours, reference, batch)
    yield from _compare_search(group, subject, ours, reference, pixels, prompts, work.settings)


def compare_inside_specimen(group: str, make_reference: MakeReference) -> Iterator[Row]:
    """What happens inside the specimen that comes with the package, whose weights are trained."""
    folder = resolve("nano")
    ours, tokenizer = load_model(folder, dtype=torch.float64), FlorenceTokenizer(folder / "tokenizer.json")
    reference = make_reference(folder, ours, torch.float64)
    if isinstance(reference, Native):
        prompts = [tokenizer.encode(build_sentence(*split_prompt(prompt))) for prompt in ("<OD>", "<CAPTION>")]
        written = [2, *tokenizer.encode("red circle<loc_41><loc_552><loc_140><loc_706>square<loc_9>")[:-1]]
        pixels = [_pixel_values(picture, folder) for picture in PICTURES]
        yield from compare_inside(group, f"the specimen / {reference.name}", ours, reference, pixels, prompts, written)


def compare_text(group: str, folder: Path, reference: Reference, count: int = 2000) -> Iterator[Row]:
    """Tokenizer, prompts and pictures, and with the remote code answers and coordinates."""
    rng, tokenizer = random.Random(7), FlorenceTokenizer(folder / "tokenizer.json")
    subject = reference.name
    texts = [random_text(rng) for _ in range(count)]
    encoded = [tokenizer.encode(text) for text in texts]
    equal = sum(reference.tokenize(text) == ids for text, ids in zip(texts, encoded, strict=True))
    yield Row(group, subject, "tokenizer, random texts", equal, count)
    both = [(ids, skip) for ids in encoded[:500] for skip in (False, True)]
    equal = sum(reference.detokenize(ids, skip) == tokenizer.decode(ids, skip) for ids, skip in both)
    yield Row(group, subject, "detokenizer", equal, len(both))
    prompts = [task.token + ("" if task.takes == "nothing" else "a car<loc_1>") for task in list(TASKS.values())[:15]]
    equal = sum(reference.sentence(prompt) == build_sentence(*split_prompt(prompt)) for prompt in prompts)
    yield Row(group, subject, "prompts", equal, len(prompts))
    equal = 0
    for picture in PIXEL_PICTURES:
        image = make_picture(*picture)
        ours = torch.from_numpy(image_to_array(open_image(image), read_image_config(folder)))
        equal += torch.equal(ours, reference.pixels(image.convert("RGB")))
    yield Row(group, subject, "pixels, bit for bit", equal, len(PIXEL_PICTURES))
    if isinstance(reference, Remote):
        yield from _compare_answers(group, subject, reference, tokenizer, texts)


def _compare_answers(
    group: str, subject: str, reference: Remote, tokenizer: FlorenceTokenizer, texts: Sequence[str]
) -> Iterator[Row]:
    rng, equal, total = random.Random(8), 0, 0
    for text in texts:
        task, size = rng.choice(list(TASKS.values())[:15]), (rng.choice([1, 333, 1920]), rng.choice([1, 517, 1080]))
        ours = parse_answer(task.token, task.answer, text, size).to_florence()
        equal, total = equal + (ours == reference.answer(task.token, text, size)), total + 1
    yield Row(group, subject, "answers, random texts", equal, total)
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
    yield Row(group, subject, "answers with scores", equal, total, worst)
    equal, generator = 0, torch.Generator().manual_seed(9)
    sizes = [(640, 480), (333, 517), (1, 1080), (1920, 1), (4000, 3000)]
    for size in sizes:
        boxes = torch.rand(400, 4, generator=generator) * 1.1 * torch.tensor([*size, *size])
        equal += pixels_to_bins(boxes.numpy(), size) == reference.pixels_to_bins(boxes, size).tolist()
    yield Row(group, subject, "coordinates to bins, 400 boxes each", equal, len(sizes))


def _compare_numbers(
    group: str,
    subject: str,
    ours: Florence2Model,
    reference: Reference,
    pixels: Sequence[Tensor],
    prompts: Sequence[list[int]],
) -> Iterator[Row]:
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
        yield Row(group, subject, f"{stage}, float64", total, total, difference)


def _compare_search(
    group: str,
    subject: str,
    ours: Florence2Model,
    reference: Reference,
    pixels: Sequence[Tensor],
    prompts: Sequence[list[int]],
    settings: Sequence[dict[str, Any]],
) -> Iterator[Row]:
    defaults = GenerationOptions.from_settings(ours.config.generation)
    equal = total = scored = written = 0
    worst, notes = 0.0, []
    for pixel_values in pixels:
        with torch.no_grad():
            features = ours.encode_image(pixel_values)
        for ids in prompts:
            with torch.no_grad():
                memory = ours.encode(features, torch.tensor([ids]))
            for changes in settings:
                options = defaults.changed(**changes)
                found = generate(ours, memory, options)
                sequences, logprobs, scores = reference.generate(pixel_values, ids, options)
                same = found.sequences.tolist() == sequences
                written += int(found.lengths.sum())
                equal, total = equal + same, total + 1
                if same:
                    scored += 1
                    worst = max(worst, _score_difference(found, logprobs, scores))
                else:
                    notes.append(f"{changes}: {_first_difference(found.sequences.tolist(), sequences)}")
    stage = f"tokens, {len(settings)} settings"
    yield Row(group, subject, stage, equal, total, note="; ".join([f"({written:,} tokens)", *notes]))
    yield Row(group, subject, "log-probabilities and scores", scored, scored, worst)


def _score_difference(found: Generation, logprobs: list[list[float]], scores: list[float] | None) -> float:
    difference = largest_difference(found.token_logprobs, logprobs)
    if scores is None:
        return difference
    # a small length penalty leaves large sums, of which float32 holds fewer digits behind the point
    scale = max(1.0, *map(abs, scores))
    return max(difference, largest_difference(found.sequence_scores, scores) / scale)


def _first_difference(ours: list[list[int]], theirs: list[list[int]]) -> str:
    for row, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        for place, (a, b) in enumerate(zip(mine, other, strict=False)):
            if a != b:
                return f"row {row}, position {place}: {a}, reference {b}"
    return f"lengths {[len(r) for r in ours]}, reference {[len(r) for r in theirs]}"


def _pixel_values(picture: Any, folder: Path) -> Tensor:
    image = make_picture(*picture) if isinstance(picture, tuple) else picture
    return torch.from_numpy(image_to_array(open_image(image), read_image_config(folder)))
