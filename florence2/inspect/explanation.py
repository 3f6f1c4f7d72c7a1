"""Explanations: everything that is known about one answer, token by token, as one value.

    explanation = explain(f, "<CAPTION>", "photo.jpg")
    explanation.tokens[3].alternatives     # what else the model could have written there
    explanation.attention.places[3]        # where it attended: (layers, heads, h, w)
    explanation.to_json()                  # all of it, for a page or a program

It is assembled from one trace; `f.trace` and the other functions of this package give the same values one by one.
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
from florence2.answers.confidence import Likelihoods, rate_regions
from florence2.answers.parsing import find_region_tokens
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import LOCATION, NUM_BINS
from florence2.inputs.image import ImageInput
from florence2.inputs.processor import TaskText
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.inspect.attention import AttentionMaps, attention_maps
from florence2.inspect.explanation_json import (
    FORMAT,
    BanValues,
    TokenMaps,
    answer_values,
    image_values,
    model_values,
    step_values,
    token_values,
)
from florence2.inspect.explanation_parts import Alternative, ExplainedRegion, ExplainedToken, Piece, Spread
from florence2.inspect.lens import logit_lens
from florence2.inspect.rollout import attention_rollout
from florence2.inspect.saliency import Saliency, input_saliency
from florence2.model.config import Florence2Config
from florence2.pipeline import EncodedImage, Florence2
from florence2.tracing.beams import BeamStep
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


@dataclass(frozen=True, eq=False)
class Explanation:
    """Everything about one answer; see `explain`.

    Attributes:
        name: The name of the model.
        config: Its configuration.
        image: The upright image.
        answer: The answer.
        prompt: The P ids of the prompt.
        tokens: The T tokens of the answer, the end included.
        regions: The boxes, quads and polygons of the answer.
        beams: The steps of the search.
        winner: The beam that wrote each token.
        attention: Cross-attention, (T, layers, heads, ...).
        rollout: Attention rollout, (T, ...).
        saliency: Gradient x input of the chosen tokens; None when switched off.
        texts: The text of every id that occurs in `beams`.
    """

    name: str
    config: Florence2Config
    image: Image.Image
    answer: Answer
    prompt: tuple[Piece, ...]
    tokens: tuple[ExplainedToken, ...]
    regions: tuple[ExplainedRegion, ...]
    beams: tuple[BeamStep, ...]
    winner: tuple[int, ...]
    attention: AttentionMaps
    rollout: AttentionMaps
    saliency: Saliency | None
    texts: Mapping[int, str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values, the image as a JPEG; `florence2.inspect.explanation_json` describes them."""
        bans = BanValues(self.texts, self.config.text.vocab_size)
        maps = TokenMaps(self.attention, self.rollout, self.saliency)
        return {
            "format": FORMAT,
            "model": model_values(self.name, self.config),
            "image": image_values(self.image, self.answer.image_size, self.attention),
            "task": self.answer.task,
            "prompt": [{"id": piece.id, "text": piece.text} for piece in self.prompt],
            "answer": answer_values(self.answer, self.regions),
            "tokens": [token_values(token, bans) | maps.of(n) for n, token in enumerate(self.tokens)],
            "beams": [step_values(step, bans) for step in self.beams],
            "winner": list(self.winner),
        }

    def to_json(self) -> str:
        """Return `to_dict` as one line of strict JSON, with Unicode unescaped."""
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
    """Answer a task on an image as `f.run` does, and explain the answer.

    Args:
        f: The model.
        task: As in `f.run`.
        image: The image itself, not an encoded one.
        text: As in `f.run`.
        box: As in `f.run`.
        options: Generation settings; the model's defaults if omitted.
        saliency: Compute gradient x input, with a backward pass through the whole model for each token.
        tokens: The numbers of the tokens, from 0, for which to compute it; all by default.
        limit: A number of bytes, as in `f.trace`.
        name: A name for the model; by default its size.

    Returns:
        The explanation.

    Raises:
        OptionError: The image is encoded, the answer does not have such a token, the values may exceed `limit`, or
            saliency is computed within `f.patched`.
        PromptError: As in `f.run`.
        ImageError: As in `f.run`.
    """
    if isinstance(image, EncodedImage):
        raise OptionError("An explanation shows the image, which an EncodedImage does not contain; give the image.")
    if tokens is not None and not saliency:
        raise OptionError(f"tokens={list(tokens)} chooses tokens for saliency, but saliency is off.")
    opened = f.processor.open_image(image)
    with trace(f, *_NAMES, limit=limit) as t:
        f.run(task, opened, text, box=box, options=options)
    gradients = input_saliency(f.model, t.run, tokens) if saliency else None
    return explain_run(f, t.run, opened, gradients, name)


def explain_run(
    f: Florence2, run: Run, image: Image.Image, saliency: Saliency | None = None, name: str = ""
) -> Explanation:
    """Explain a run of `f` that a trace has already kept, with the names that `explain` keeps."""
    tokenizer, beams = f.processor.tokenizer, run.beams
    return Explanation(
        name=name or _describe(f),
        config=f.model.config,
        image=image,
        answer=run.answer,
        prompt=tuple(Piece(id, show_token(tokenizer, id)) for id in run.prompt_ids),
        tokens=_explain_tokens(f, run),
        regions=_find_regions(run, _location_ids(tokenizer)),
        beams=beams,
        winner=run.rows(),
        attention=attention_maps(run),
        rollout=attention_rollout(run),
        saliency=saliency,
        texts={id: show_token(tokenizer, id) for id in sorted(_ids_of(beams))},
    )


def show_token(tokenizer: FlorenceTokenizer, id: int) -> str:
    """Return the text of one id; for a part of a character, or an id without text, its name in the vocabulary."""
    text = tokenizer.decode([id])
    return tokenizer.id_to_token(id) if not text or "\ufffd" in text else text


def _describe(f: Florence2) -> str:
    count = sum(parameter.numel() for parameter in f.model.parameters())
    return f"Florence-2, {count / 1e6:,.0f} M parameters"


def _explain_tokens(f: Florence2, run: Run) -> tuple[ExplainedToken, ...]:
    tokenizer, lens = f.processor.tokenizer, logit_lens(f.model, run, LENS)
    locations = _location_ids(tokenizer)

    def alternatives(ids: Tensor, probabilities: Tensor) -> tuple[Alternative, ...]:
        pairs = zip(ids.tolist(), probabilities.tolist(), strict=True)
        return tuple(Alternative(id, show_token(tokenizer, id), p) for id, p in pairs if p > 0.0)

    tokens = []
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
        tokens.append(token)
    return tuple(tokens)


def measure_spread(probabilities: Tensor, chosen: int) -> Spread:
    """Measure the spread of the probabilities (bins,) of all location bins, where the model wrote `chosen`."""
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
    ids = [tokenizer.token_id(f"<loc_{bin}>") for bin in range(NUM_BINS)]
    return [id for id in ids if id is not None]


def _find_regions(run: Run, locations: Sequence[int]) -> tuple[ExplainedRegion, ...]:
    """Return the shapes of an answer with the tokens that each was read from, and the parts of its confidence."""
    answer = run.answer
    shapes: list[Box | Quad | Polygon] = [*answer.boxes, *answer.quads, *answer.polygons]
    written = find_region_tokens(answer.kind, answer.token_texts)
    logprobs = torch.tensor(answer.token_logprobs)
    scores = run.along_answer("scores")[:, list(locations)].detach().float().exp()  # (T, bins)
    likelihoods = Likelihoods(logprobs.numpy(), scores.cpu().numpy())
    parts = rate_regions(answer.kind, answer.token_texts, likelihoods)
    return tuple(
        ExplainedRegion(
            shape, tokens, tuple(logprobs[list(tokens)].exp().tolist()), None if shape.confidence is None else part
        )
        for shape, tokens, part in zip(shapes, written, parts, strict=True)
    )


def _ids_of(beams: Sequence[BeamStep]) -> set[int]:
    """Return the ids of every candidate and ban."""
    ids = {candidate.token for step in beams for candidate in step.candidates}
    for step in beams:
        for ban in step.bans:
            ids |= {*ban.ids, *(() if ban.only is None else (ban.only,))}
    return ids
