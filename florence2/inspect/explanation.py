"""Why this answer: everything that is known about one run, token by token, as one value.

    found = explain(f, "<CAPTION>", "photo.jpg")
    found.tokens[3].alternatives     # what else might have stood there
    found.attention.places[3]        # where it looked: (layers, heads, h, w)
    found.to_json()                  # all of it, for a page or a program

It is put together from one trace, and adds nothing that `f.trace` and the functions beside this one would not give.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from florence2.answers.answer import Answer, Box, Polygon, Quad
from florence2.answers.parsing import find_region_tokens
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import LOCATION, NUM_BINS
from florence2.inputs.image import ImageInput, open_image
from florence2.inputs.processor import TaskText
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.inspect.attention_maps import AttentionMaps, map_attention
from florence2.inspect.explanation_json import to_plain_explanation
from florence2.inspect.lens import read_lens
from florence2.inspect.rollout import roll_out
from florence2.inspect.saliency import Saliency, find_saliency
from florence2.model.config import Florence2Config
from florence2.pipeline import EncodedImage, Florence2
from florence2.tracing.beams import Ban, BeamStep
from florence2.tracing.recording import trace
from florence2.tracing.runs import Run

ALTERNATIVES, LENS = 8, 3
LIMIT = 4 << 30
_NAMES = (
    "pixel_values",
    "=encoder.layers.*.self_attention.weights",
    "=decoder.layers.*.cross_attention.weights",
    "=decoder.embedding",
    "=decoder.layers.*",
    "=scores",
)


@dataclass(frozen=True)
class Piece:
    """An id and its text; a part of a character is shown as the vocabulary calls it."""

    id: int
    text: str


@dataclass(frozen=True)
class Alternative(Piece):
    """An id that might have been written, with its probability, 0..1."""

    probability: float


@dataclass(frozen=True)
class Spread:
    """How the model spread its probability over the location bins where it wrote `chosen`.

    `probabilities` are those of all bins after the rules of the search; `mass` is their sum, which is below 1 where
    the model might have written something other than a location. `mean` and `std`, in bins of a thousandth of the
    picture's width or height, are of the bins alone; `distance` is the root of the mean square distance from `chosen`.
    """

    chosen: int
    probabilities: tuple[float, ...]
    mass: float
    mean: float
    std: float
    distance: float


@dataclass(frozen=True)
class ExplainedToken(Piece):
    """One token of the answer.

    `probability` is what the search counted, 1 for a forced id. `alternatives` are the likeliest at this place after
    the rules, itself included, best first; `bans` what the rules made impossible here. `lens` is, for the embedding
    and then each layer of the decoder, what it would have said (see `read_lens`). `spread` is None but for locations.
    """

    probability: float
    alternatives: tuple[Alternative, ...]
    bans: tuple[Ban, ...]
    lens: tuple[tuple[Alternative, ...], ...]
    spread: Spread | None


@dataclass(frozen=True)
class Region:
    """A box, quad or polygon of the answer: which tokens it was read from, and their probabilities, whose geometric
    mean its score is."""

    shape: Box | Quad | Polygon
    tokens: tuple[int, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Explanation:
    """Everything about one answer; see `explain`.

    `winner` says which beam wrote each token. `attention` is (T, layers, heads, ...) long, `rollout` (T, ...).
    `saliency` is None when it was not asked for, and has the tokens for which it was. `texts` are those of all ids
    that occur in `beams`.
    """

    name: str
    config: Florence2Config
    picture: Image.Image
    answer: Answer
    prompt: tuple[Piece, ...]
    tokens: tuple[ExplainedToken, ...]
    regions: tuple[Region, ...]
    beams: tuple[BeamStep, ...]
    winner: tuple[int, ...]
    attention: AttentionMaps
    rollout: AttentionMaps
    saliency: Saliency | None
    texts: Mapping[int, str]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, all numbers finite, the picture as a JPEG; see `florence2.inspect.explanation_json`."""
        return to_plain_explanation(self)

    def to_json(self) -> str:
        """`to_dict` as one line of strict JSON, Unicode kept."""
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)


def explain(
    f: Florence2,
    task: str,
    image: ImageInput,
    text: TaskText = None,
    *,
    box: Sequence[float] | None = None,
    options: GenerationOptions | None = None,
    saliency: bool = True,
    tokens: Sequence[int] | None = None,
    limit: int = LIMIT,
    name: str = "",
) -> Explanation:
    """Answer a task on a picture as `f.run` does, and say why this answer.

    The arguments up to `options` are those of `f.run`, but `image` must be the picture itself. `saliency` takes a
    backward pass through the whole model for each token: those numbered in `tokens`, from 0, or all. `limit` is in
    bytes, as in `f.trace`; `name` is what the model is to be called. Raises as `f.run` and `f.trace`, and OptionError
    for an encoded picture, a token that the answer does not have, or saliency inside of `f.patched`.
    """
    if isinstance(image, EncodedImage):
        raise OptionError("An explanation shows the picture, which an EncodedImage no longer has; give the picture.")
    if tokens is not None and not saliency:
        raise OptionError(f"tokens={list(tokens)} chooses what to compute saliency of, but saliency is off.")
    picture = open_image(image)
    with trace(f, *_NAMES, limit=limit) as t:
        f.run(task, picture, text, box=box, options=options)
    found = find_saliency(f.model, t.run, tokens) if saliency else None
    return explain_run(f, t.run, picture, found, name)


def explain_run(
    f: Florence2, run: Run, picture: Image.Image, saliency: Saliency | None = None, name: str = ""
) -> Explanation:
    """The same from a run of `f` that a trace has kept already, with the names that `explain` keeps."""
    tokenizer, beams = f.processor.tokenizer, run.beams
    return Explanation(
        name=name or _describe(f),
        config=f.model.config,
        picture=picture,
        answer=run.answer,
        prompt=tuple(Piece(id, show_token(tokenizer, id)) for id in run.prompt_ids),
        tokens=_explain_tokens(f, run),
        regions=_find_regions(run.answer),
        beams=beams,
        winner=run.rows(),
        attention=map_attention(run),
        rollout=roll_out(run),
        saliency=saliency,
        texts={id: show_token(tokenizer, id) for id in sorted(_ids_of(beams))},
    )


def show_token(tokenizer: FlorenceTokenizer, id: int) -> str:
    """The text of one id; for a part of a character, and for an id without text, what the vocabulary calls it."""
    text = tokenizer.decode([id])
    return tokenizer.id_to_token(id) if not text or "\ufffd" in text else text


def _describe(f: Florence2) -> str:
    count = sum(parameter.numel() for parameter in f.model.parameters())
    return f"Florence-2, {count / 1e6:,.0f} M parameters"


def _explain_tokens(f: Florence2, run: Run) -> tuple[ExplainedToken, ...]:
    tokenizer, lens = f.processor.tokenizer, read_lens(f.model, run, LENS)
    locations = _location_ids(tokenizer)

    def alternatives(ids: Tensor, probabilities: Tensor) -> tuple[Alternative, ...]:
        pairs = zip(ids.tolist(), probabilities.tolist(), strict=True)
        return tuple(Alternative(id, show_token(tokenizer, id), p) for id, p in pairs if p > 0.0)

    found = []
    for n, (id, row, scores) in enumerate(zip(run.answer_ids(), run.rows(), run.along_answer("scores"), strict=True)):
        probabilities, text = scores.exp(), show_token(tokenizer, id)  # (V,)
        best = probabilities.topk(min(ALTERNATIVES, len(probabilities)))
        location = LOCATION.fullmatch(text)
        token = ExplainedToken(
            id=id,
            text=text,
            probability=math.exp(run.answer.token_logprobs[n]),
            alternatives=alternatives(best.indices, best.values),
            bans=tuple(ban for ban in run.beams[n].bans if ban.beam == row),
            lens=tuple(
                alternatives(*depth) for depth in zip(lens.ids[n].unbind(), lens.probabilities[n].unbind(), strict=True)
            ),
            spread=measure_spread(probabilities[locations], int(location[1])) if location else None,
        )
        found.append(token)
    return tuple(found)


def measure_spread(probabilities: Tensor, chosen: int) -> Spread:
    """The spread of the probabilities (bins,) of all location bins, where the model wrote the bin `chosen`."""
    weights = probabilities.double()
    mass, bins = weights.sum(), torch.arange(len(weights), dtype=torch.float64, device=weights.device)
    weights = weights / mass
    mean = (weights * bins).sum()
    return Spread(
        chosen=chosen,
        probabilities=tuple(probabilities.tolist()),
        mass=min(1.0, float(mass)),
        mean=float(mean),
        std=float((weights * (bins - mean).square()).sum().sqrt()),
        distance=float((weights * (bins - chosen).square()).sum().sqrt()),
    )


def _location_ids(tokenizer: FlorenceTokenizer) -> list[int]:
    found = [tokenizer.token_id(f"<loc_{bin}>") for bin in range(NUM_BINS)]
    return [id for id in found if id is not None]


def _find_regions(answer: Answer) -> tuple[Region, ...]:
    """The shapes of an answer with the tokens that `florence2.answers.answer` read each from."""
    shapes: list[Box | Quad | Polygon] = [*answer.boxes, *answer.quads, *answer.polygons]
    written = find_region_tokens(answer.kind, answer.token_texts)
    logprobs = torch.tensor(answer.token_logprobs)
    return tuple(
        Region(shape, tokens, tuple(logprobs[list(tokens)].exp().tolist()))
        for shape, tokens in zip(shapes, written, strict=True)
    )


def _ids_of(beams: Sequence[BeamStep]) -> set[int]:
    """The ids of every candidate and ban."""
    ids = {candidate.token for step in beams for candidate in step.candidates}
    for step in beams:
        for ban in step.bans:
            ids |= {*ban.ids, *(() if ban.only is None else (ban.only,))}
    return ids
