"""The numbers of every drawing, measured on nano and one scene that it was not trained on.

A function for each chapter returns texts and arrays by name; `recipes.book.figures` draws them.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import florence2
from florence2.inputs.coordinates import box_to_tokens
from florence2.inputs.image import open_image
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.pipeline import Florence2
from florence2.tracing.beams import BeamStep

ROOT = Path(__file__).parents[2]
SCENE = ROOT / "docs" / "scene.png"
WIDE = ROOT / "docs" / "scenes" / "000002.png"
PUBLISHED_TOKENIZER = ROOT / "parity" / "golden" / "tokenizer.json"
WORD = (69, 2, 135, 41)
"""The box of the word PIG in the scene, in pixels."""
STAGE, PLACE = 1, (15, 9)
"""Where the chapter on DaViT looks: a stage, and the row and column of a position in its grid."""
Values = dict[str, Any]


def load_nano() -> Florence2:
    """Return nano on the CPU, where the numbers are the same everywhere up to rounding."""
    return florence2.load("nano", device="cpu")


def prompt_values(f: Florence2) -> Values:
    """Return the pieces of three prompts and their ids, from the published tokenizer and from nano's."""
    published = FlorenceTokenizer(PUBLISHED_TOKENIZER)
    detection = florence2.TASKS["<OD>"].sentence
    region = box_to_tokens(WORD, open_image(SCENE).size)
    reading = florence2.TASKS["<REGION_TO_OCR>"].sentence.replace("{input}", region)
    rows = [("base", detection, published), ("base", reading, published), ("nano", detection, f.processor.tokenizer)]
    values: Values = {}
    for number, (name, sentence, tokenizer) in enumerate(rows):
        ids = tokenizer.encode(sentence)
        values[f"{number}.name"] = name
        values[f"{number}.ids"] = np.array(ids)
        values[f"{number}.tokens"] = [tokenizer.id_to_token(id).replace("Ġ", "␣") for id in ids]
    return values


def pixel_values(f: Florence2) -> Values:
    """Return an image that is not square, what the model sees of it, and a box in both."""
    image = open_image(WIDE)
    config = f.processor.image_config
    seen = np.asarray(image.resize((config.width, config.height), Image.Resampling(config.resample)))
    box = f.run("<OD>", WIDE, num_beams=1).boxes[2]
    return {
        "image": np.asarray(image),
        "seen": seen,
        "values": f.processor.image_array(WIDE)[0],
        "box": np.array(box.xyxy),
        "label": box.label,
    }


@torch.no_grad()
def davit_values(f: Florence2) -> Values:
    """Return how far a change of one position spreads through either attention, and one matrix of channels."""
    tower: Any = f.model.vision_tower
    pair = tower.blocks[STAGE][0]
    with f.trace(
        f"vision_tower.convs.{STAGE}", f"vision_tower.blocks.{STAGE}.0.channel_block.channel_attn.weights"
    ) as t:
        f.encode_image(SCENE)
    grid = t.images[0][f"vision_tower.convs.{STAGE}"][None]  # (1, H, W, C)
    changed = grid.clone()
    changed[0, PLACE[0], PLACE[1]] = 0
    values: Values = {
        "window": tower.blocks[STAGE][0].spatial_block.window_attn.window,
        "shape_of_grid": list(grid.shape[1:]),
    }
    for name, block, attention in (
        ("windows", pair.spatial_block, pair.spatial_block.window_attn),
        ("channels", pair.channel_block, pair.channel_block.channel_attn),
    ):
        change = attention(block.norm1(changed), florence2.model.trace.NO_TRACE)
        change = change - attention(block.norm1(grid), florence2.model.trace.NO_TRACE)
        values[name] = change[0].norm(dim=-1).numpy()  # (H, W)
    values["matrix"] = t.images[0][f"vision_tower.blocks.{STAGE}.0.channel_block.channel_attn.weights"][
        0
    ].numpy()  # (c, c)
    return values


@torch.no_grad()
def projection_values(f: Florence2) -> Values:
    """Return the image tokens as colours, and how alike the embedding of one position is to all others."""
    tokens = f.encode_image(SCENE).features[0]  # (N, D)
    h, w = f.model.config.vision.grid_size(f.processor.image_config.height, f.processor.image_config.width)
    places = tokens[1:] - tokens[1:].mean(dim=0)
    directions = torch.linalg.svd(places, full_matrices=False).Vh[:3]  # the three in which the tokens differ most
    directions = directions * directions.sum(dim=1).sign()[:, None]  # a direction has no sign of its own
    colours = (tokens - tokens[1:].mean(dim=0)) @ directions.T  # (N, 3)
    low, high = colours[1:].quantile(0.02, dim=0), colours[1:].quantile(0.98, dim=0)
    colours = ((colours - low) / (high - low)).clamp(0, 1)
    table = f.model.multi_modal_projector.image_position_embed(h, w).flatten(0, 1)  # (h·w, C)
    table = table - table.mean(dim=0)
    table = table / table.norm(dim=1, keepdim=True)
    return {
        "colours": colours[1:].view(h, w, 3).numpy(),
        "mean": colours[0].numpy(),
        "alike": (table @ table[5 * w + 7]).view(h, w).numpy(),
    }


def attention_values(f: Florence2) -> Values:
    """Return where the decoder looked while it wrote one object: its label and its four locations."""
    layer = f.model.config.text.decoder_layers - 1
    name = f"decoder.layers.{layer}.cross_attention.weights"
    with f.trace(name) as t:
        answer = f.run("<OD>", SCENE, num_beams=1, confidence=False)
    weights = t.along_answer(name).mean(dim=1)  # (T, S): the mean over heads
    texts = answer.token_texts[1:]
    is_place = [text.startswith("<loc_") for text in texts]
    last = max(i for i, place in enumerate(is_place) if place)
    label = max(i for i in range(last - 4) if is_place[i]) + 1  # where the label of the last object begins
    rows = [label, *range(last - 3, last + 1)]  # x1, y1, x2, y2
    h, w = t.run.image_grid
    return {
        "tokens": [texts[row] for row in rows],
        "maps": weights[rows, t.run.grid_span].view(5, h, w).numpy(),
        "mean token": weights[rows, 0].numpy(),
        "image": weights[rows, t.run.grid_span].sum(dim=1).numpy(),
        "prompt": weights[rows, t.run.prompt_span].sum(dim=1).numpy(),
        "box": np.array(answer.boxes[-1].xyxy),
    }


def search_steps(f: Florence2) -> tuple[BeamStep, ...]:
    """Return the steps of a short search: the category of the word in the scene, with three beams."""
    with f.trace("search") as t:
        f.run("<REGION_TO_CATEGORY>", SCENE, WORD, confidence=False)
    return t.beams


def search_values(f: Florence2) -> Values:
    """Return every candidate of that search: step, parent, text, sum, fate and place among the beams."""
    steps = search_steps(f)
    rows = [(step.number, candidate) for step in steps[1:] for candidate in step.candidates]
    return {
        "step": np.array([number for number, _ in rows]),
        "parent": np.array([candidate.parent for _, candidate in rows]),
        "sum": np.array([candidate.sum for _, candidate in rows]),
        "beam": np.array([-1 if candidate.beam is None else candidate.beam for _, candidate in rows]),
        "text": [token_text(f, candidate.token) for _, candidate in rows],
        "fate": [candidate.fate for _, candidate in rows],
    }


def token_text(f: Florence2, id: int) -> str:
    """Return a token as it is shown: a space as ␣."""
    return f.processor.tokenizer.id_to_token(id).replace("Ġ", "␣")


@torch.no_grad()
def answer_values(f: Florence2) -> Values:
    """Return an answer of each kind in pixels, and the probabilities of all bins where one coordinate was written."""
    image = f.encode_image(SCENE)
    boxes = f.run("<OD>", image, num_beams=1)
    quads = f.run("<OCR_WITH_REGION>", image, num_beams=1)
    polygons = f.run("<REFERRING_EXPRESSION_SEGMENTATION>", image, "a blue triangle", num_beams=1)
    memory = f.model.encode(image.features, torch.tensor([f.processor.prompt("<OD>")]))
    logits = f.model.decode(torch.tensor([boxes.token_ids[:-1]]), memory)[0]  # (T, V)
    first = f.processor.tokenizer.token_id("<loc_0>")
    assert first is not None
    place = next(i for i, text in enumerate(boxes.token_texts) if text == "triangle"[-len(text) :] and i > 8)
    place = next(i for i in range(place, len(boxes.token_texts)) if boxes.token_texts[i].startswith("<loc_"))
    return {
        "boxes": np.array([box.xyxy for box in boxes.boxes]),
        "labels": [box.label for box in boxes.boxes],
        "quads": np.array([quad.xyxyxyxy for quad in quads.quads]),
        "texts": [quad.label for quad in quads.quads],
        "polygon": np.array(polygons.polygons[0].rings[0]),
        "written": int(boxes.token_texts[place].strip("<loc_>")),
        "bins": logits[place - 1].softmax(dim=-1)[first : first + 1000].numpy(),
        "box": np.array(boxes.boxes[[box.label for box in boxes.boxes].index("triangle")].xyxy),
        "score": np.array([box.score for box in boxes.boxes]),
        "confidence": np.array([box.confidence for box in boxes.boxes]),
    }


CHAPTERS = {
    "prompt": prompt_values,
    "pixels": pixel_values,
    "davit": davit_values,
    "projection": projection_values,
    "encoder-decoder": attention_values,
    "beam-search": search_values,
    "answers": answer_values,
}


def summarise(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as JSON can hold and a test can compare: arrays by their shape, mean and deviation."""
    return {name: _summary(value) for name, value in values.items()}


def _summary(value: Any) -> Any:
    if not isinstance(value, np.ndarray):
        return value
    numbers = value.astype(np.float64)
    return {"shape": list(value.shape), "mean": float(f"{numbers.mean():.3g}"), "std": float(f"{numbers.std():.3g}")}


def summaries(f: Florence2) -> dict[str, Any]:
    """Return the summary of every chapter, as `figures.json` holds it."""
    plain: dict[str, Any] = json.loads(json.dumps({name: summarise(measure(f)) for name, measure in CHAPTERS.items()}))
    return plain
