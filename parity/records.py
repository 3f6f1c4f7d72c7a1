"""Compare with recorded outputs of the remote code; this needs only the repository."""

import json
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from florence2.answers.answer import parse_answer
from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.config_files import read_config, read_image_config
from florence2.fast.install import install
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.inputs.image import ImageConfig, image_to_array, open_image
from florence2.inputs.tasks import TASKS, build_sentence, split_prompt
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.florence2 import Florence2Model
from parity.recipe import GOLDEN, make_checkpoint, make_picture
from parity.report import Comparison, largest_difference
from parity.ties import TokenCount

_GROUP = "records"
_SUBJECT = "records of the remote code"


def compare_records() -> Iterator[Comparison]:
    """Compare all recorded stages, in the order that an image passes them."""
    yield from compare_tokenizer()
    yield compare_pixels()
    yield from compare_answers()
    yield from compare_model()


def read_record(name: str) -> Any:
    """Read one JSON file of `golden/`."""
    return json.loads((GOLDEN / name).read_text(encoding="utf-8"))


def make_recorded_checkpoint(folder: Path) -> None:
    """Write the checkpoint that the outputs in `golden/tiny` were recorded from."""
    golden = read_record("tiny/golden.json")
    make_checkpoint(folder, read_config(GOLDEN / "tiny"), golden["seed"], golden["eos_bonus"])


def compare_tokenizer() -> Iterator[Comparison]:
    """Compare recorded strings and prompts, from text to ids and back."""
    tokenizer, records = FlorenceTokenizer(GOLDEN / "tokenizer.json"), read_record("tokens.json")
    strings = records["strings"]
    equal = sum(
        tokenizer.encode(r["text"]) == r["ids"]
        and tokenizer.decode(r["ids"]) == r["decoded"]
        and tokenizer.decode(r["ids"], skip_special=True) == r["decoded_skip"]
        for r in strings
    )
    yield Comparison(_GROUP, _SUBJECT, "tokenizer, both ways", equal, len(strings))
    prompts = records["prompts"]
    sentences = [build_sentence(*split_prompt(r["text"])) for r in prompts]
    equal = sum(s == r["prompt"] and tokenizer.encode(s) == r["ids"] for s, r in zip(sentences, prompts, strict=True))
    yield Comparison(_GROUP, _SUBJECT, "prompts", equal, len(prompts))


def compare_pixels() -> Comparison:
    """Compare recorded values of normalised pixels, for images of several modes."""
    config, records, equal = read_image_config(GOLDEN / "tiny"), read_record("pixels.json"), 0
    for record in records:
        width, height = record["size"]
        image = open_image(make_picture(record["seed"], width, height, record["mode"]))
        values = torch.from_numpy(image_to_array(image, config)).flatten()
        sampled = values[record["index"]].numpy()
        expected = np.array(record["value"], np.float32)
        equal += bool((sampled == expected).all() and abs(float(values.double().sum()) - record["sum"]) < 1e-6)
    return Comparison(_GROUP, _SUBJECT, "pixels, bit for bit", equal, len(records))


def compare_answers() -> Iterator[Comparison]:
    """Compare the parsing of generated texts, and of generated ids with their scores."""
    tokenizer, records = FlorenceTokenizer(GOLDEN / "tokenizer.json"), read_record("post.json")
    equal = 0
    for record in records["post"]:
        kind = TASKS[record["task"]].answer if record["task"] in TASKS else "text"
        answer = parse_answer(record["task"], kind, record["text"], tuple(record["image_size"]))
        equal += answer.to_florence() == record["answer"]
    yield Comparison(_GROUP, _SUBJECT, "answers", equal, len(records["post"]))
    equal, worst = 0, 0.0
    for record in records["scored"]:
        ids, task = record["sequence"], record["task"]
        answer = parse_answer(
            task,
            TASKS[task].answer,
            tokenizer.decode(ids),
            tuple(record["image_size"]),
            token_ids=ids,
            token_logprobs=record["transition_scores"],
            token_texts=tokenizer.token_texts(ids),
        )
        ours, theirs = answer.to_florence()[task], record["answer"][task]
        worst = max(worst, largest_difference(ours.pop("scores"), theirs.pop("scores")))
        equal += ours == theirs
    yield Comparison(_GROUP, _SUBJECT, "answers with scores", equal, len(records["scored"]), worst)


def compare_model(
    change: Callable[[Florence2Model], None] | None = None, runs: int | None = None, folder: Path | None = None
) -> Iterator[Comparison]:
    """Compare the stages of the recorded checkpoint, on all recorded runs or the first few.

    The stages come before the searches, so that nobody need wait for these. `change` may damage the model first, to
    show that the comparison then fails, or move it to another device. `folder` holds the checkpoint, if it has been
    made already.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            make_recorded_checkpoint(Path(made))
            yield from compare_model(change, runs, Path(made))
        return
    golden, arrays = read_record("tiny/golden.json"), np.load(GOLDEN / "tiny" / "golden.npz")
    model = install(load_model(folder))
    if change is not None:
        change(model)
    here = partial(torch.tensor, device=model.device)
    tokenizer, image_config = FlorenceTokenizer(folder / "tokenizer.json"), read_image_config(folder)
    worst = dict.fromkeys(("features", "encoder", "logits", "loss", "scores"), 0.0)
    counts = dict.fromkeys(worst, 0)
    count, choices = TokenCount(), 0
    encoded: list[tuple[list[dict[str, Any]], Callable[[], Tensor], Tensor]] = []

    def note(stage: str, ours: Any, theirs: Any) -> None:
        worst[stage], counts[stage] = max(worst[stage], largest_difference(ours, theirs)), counts[stage] + 1

    for run in golden["runs"][:runs]:
        key = f"p{run['picture']}q{run['prompt']}"
        image = open_image(make_picture(*golden["pictures"][run["picture"]]))
        ids = tokenizer.encode(build_sentence(*split_prompt(golden["prompts"][run["prompt"]])))
        with torch.no_grad():
            pixel_values, prompt = torch.from_numpy(image_to_array(image, image_config)), here([ids])
            features = model.encode_image(pixel_values)
            encode = partial(model.encode, features, prompt)
            memory = encode()
            logits = model.decode(here([run["decoder_input_ids"]]), memory)
            note("loss", float(model.loss(pixel_values, prompt, here([run["labels"]]))), run["loss"])
        for stage, tensor in (("features", features), ("encoder", memory), ("logits", logits)):
            if f"{key}.{stage}.index" in arrays:
                note(
                    stage,
                    tensor.flatten().cpu().numpy()[arrays[f"{key}.{stage}.index"]],
                    arrays[f"{key}.{stage}.value"],
                )
        choices += logits[0].argmax(dim=-1).tolist() == run["logits_argmax"]
        encoded.append((run["generations"], encode, memory))
    for stage in ("features", "encoder", "logits", "loss"):
        yield Comparison(_GROUP, _SUBJECT, stage, counts[stage], counts[stage], worst[stage])
    yield Comparison(_GROUP, _SUBJECT, "likeliest next tokens", choices, len(golden["runs"][:runs]))
    for generations, encode_again, memory in encoded:
        for recorded in generations:
            options = GenerationOptions.from_settings(model.config.generation).changed(**recorded["options"])
            generation = generate(model, memory, options)
            same = count.add(model, encode_again, generation.sequences.tolist(), recorded["sequences"])
            if same and "sequences_scores" in recorded:
                note("scores", generation.token_logprobs.cpu(), recorded["transition_scores"])
    yield Comparison(_GROUP, _SUBJECT, "tokens, all settings", count.equal, count.total, ties=count.ties)
    yield Comparison(_GROUP, _SUBJECT, "token log-probabilities", counts["scores"], counts["scores"], worst["scores"])
    if runs is None:
        yield _compare_batch(golden, model, image_config)


def _compare_batch(golden: dict[str, Any], model: Florence2Model, image_config: ImageConfig) -> Comparison:
    """Compare four images at once with one prompt: without padding, the reference's batch is right too."""
    batch = golden["batch"]
    images = [open_image(make_picture(*case)) for case in golden["pictures"]]
    ids = FlorenceTokenizer(GOLDEN / "tokenizer.json").encode(build_sentence(*split_prompt(batch["prompt"])))
    options = GenerationOptions.from_settings(model.config.generation).changed(**batch["options"])
    with torch.no_grad():
        features = model.encode_image(
            torch.cat([torch.from_numpy(image_to_array(image, image_config)) for image in images])
        )
        memory = model.encode(features, torch.tensor([ids] * len(images), device=model.device))
    sequences, count = generate(model, memory, options).sequences.tolist(), TokenCount()
    for i, (mine, other) in enumerate(zip(sequences, batch["sequences"], strict=True)):
        count.add(model, partial(memory.narrow, 0, i, 1), [mine], [other])
    return Comparison(_GROUP, _SUBJECT, "tokens of a batch", count.equal, count.total, ties=count.ties)
