"""An explanation as plain JSON, which the report page and other programs read.

    format, model, image, task, prompt, answer     what was asked of which model, what came out
    tokens[n]                                      one entry for each token of the answer, the end included
      .alternatives .banned .lens .spread          what else, what not, what each layer thought, where else
      .attention .saliency                         where it looked, what it hangs on
    beams[n]                                       what each step of the search compared; `winner` is the beam by which
                                                   each token was written: its candidate's `parent` in step n

Maps are bytes in base64, row by row: a weight is byte / 255 x `peak`, the largest of this token, layer and head over
places and prompt. A rollout is in parts of its own largest; so is a cell's saliency, of which the size counts and not
the sign. Numbers are finite, and probabilities rounded to four digits.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from florence2.answers.answer import Answer, Box, Polygon, Quad
from florence2.model.config import VisionConfig
from florence2.tracing.beams import Ban, BeamStep, Candidate

if TYPE_CHECKING:
    from florence2.inspect.explanation import Alternative, ExplainedToken, Explanation, Region, Spread

FORMAT = 1
MAX_SIDE = 1024
_BINS, _TEXTS = 40, 8
_LOWEST = -1e9  # of a sum: what the search itself takes for nothing


def to_plain_explanation(found: "Explanation") -> dict[str, Any]:
    """All of an explanation."""
    h, w = found.attention.places.shape[-2:]
    width, height = found.answer.image_size
    text = found.config.text
    values = _TokenValues(found)
    return {
        "format": FORMAT,
        "model": {
            "name": found.name,
            "layers": text.decoder_layers,
            "heads": text.decoder_attention_heads,
            "vision": _describe_vision(found.config.vision),
        },
        "image": {
            "width": width,
            "height": height,
            "grid": [h, w],
            "pooled": found.attention.pooled.shape[-1],
            "data": picture_data(found.picture),
        },
        "task": found.answer.task,
        "prompt": [{"id": piece.id, "text": piece.text} for piece in found.prompt],
        "answer": _answer(found.answer, found.regions),
        "tokens": [values.token(n, token) for n, token in enumerate(found.tokens)],
        "beams": [_step(step, found) for step in found.beams],
        "winner": list(found.winner),
    }


def picture_data(picture: Image.Image) -> str:
    """A picture as a data URI of a JPEG whose longer side is at most MAX_SIDE pixels."""
    small = picture.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _describe_vision(vision: VisionConfig) -> str:
    widths, depths = ("-".join(map(str, sizes)) for sizes in (vision.dim_embed, vision.depths))
    return f"DaViT, widths {widths}, depths {depths}, windows of {vision.window_size}"


def _answer(answer: Answer, regions: "Sequence[Region]") -> dict[str, Any]:
    shapes: dict[type, list[dict[str, Any]]] = {Box: [], Quad: [], Polygon: []}
    for region in regions:
        plain = {
            "label": region.shape.label,
            "score": None if region.shape.score is None else _probability(region.shape.score),
            "tokens": [region.tokens[0], region.tokens[-1]],
            **_points(region.shape),
        }
        shapes[type(region.shape)].append(plain)
    return {
        "kind": answer.kind,
        "text": answer.text,
        "score": None if answer.score is None else _probability(answer.score),
        "finish_reason": answer.finish_reason,
        "boxes": shapes[Box],
        "quads": shapes[Quad],
        "polygons": shapes[Polygon],
    }


def _points(shape: Box | Quad | Polygon) -> dict[str, Any]:
    """A box's corners, a quad's four points, a polygon's rings of points."""
    if isinstance(shape, Box):
        return {"xyxy": _coordinates(shape.xyxy)}
    if isinstance(shape, Quad):
        return {"points": _pairs(shape.xyxyxyxy)}
    return {"points": [_pairs(ring) for ring in shape.rings]}


def _coordinates(row: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in row]


def _pairs(row: Sequence[float]) -> list[list[float]]:
    rounded = _coordinates(row)
    return [rounded[i : i + 2] for i in range(0, len(rounded), 2)]


@dataclass(frozen=True)
class _Quantised:
    """Values of all tokens, as bytes and the peaks that they are parts of."""

    places: Tensor  # (T, ..., h, w) uint8
    prompt: Tensor  # (T, ..., P) uint8
    peak: Tensor  # (T, ...)


class _TokenValues:
    """The tokens of one explanation, with their maps in bytes."""

    def __init__(self, found: "Explanation"):
        self.found = found
        self.attention = _quantise(found.attention.places, found.attention.prompt)
        rollout = found.rollout.places
        self.rollout = _quantise(rollout, rollout.new_zeros(len(rollout), 0)).places
        self.shares = _rounded(found.attention.image_share)
        self.saliency: dict[int, dict[str, Any]] = {}
        if found.saliency is not None:
            places, h, w = found.saliency, *rollout.shape[-2:]
            cells = places.by_cell((h, w)).abs()
            maps = _quantise(cells, cells.new_zeros(len(cells), 0)).places
            for i, token in enumerate(places.tokens):
                words = [float(f"{value:.4g}") for value in places.prompt[i].tolist()]
                self.saliency[token] = {"image": _bytes(maps[i]), "prompt": words}

    def token(self, n: int, token: "ExplainedToken") -> dict[str, Any]:
        """The entry of token n."""
        return {
            "id": token.id,
            "text": token.text,
            "probability": _probability(token.probability),
            "location": None if token.spread is None else token.spread.chosen,
            "alternatives": [{"id": other.id, **_likely(other)} for other in token.alternatives],
            "banned": [_ban(ban, self.found) for ban in token.bans],
            "lens": [[_likely(other) for other in depth] for depth in token.lens],
            "attention": self._attention(n),
            "saliency": self.saliency.get(n),
            "spread": None if token.spread is None else _spread(token.spread),
        }

    def _attention(self, n: int) -> dict[str, Any]:
        maps = self.attention
        return {
            "peak": [[float(f"{value:.4g}") for value in layer] for layer in maps.peak[n].tolist()],
            "image": self.shares[n].tolist(),
            "maps": [[_bytes(head) for head in layer] for layer in maps.places[n]],
            "prompt": maps.prompt[n].tolist(),
            "rollout": _bytes(self.rollout[n]),
        }


def _quantise(places: Tensor, prompt: Tensor) -> _Quantised:
    """Weights of places (..., h, w) and prompt (..., P), none negative, as parts of the larger maximum of both."""
    together = torch.cat([places.flatten(-2), prompt], dim=-1).double().cpu()
    peak = together.amax(dim=-1)
    parts = (together / peak.clamp(min=1e-300)[..., None] * 255).round().to(torch.uint8)
    cells = places.shape[-2] * places.shape[-1]
    return _Quantised(parts[..., :cells].view(places.shape), parts[..., cells:], peak)


def _bytes(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().numpy().tobytes()).decode("ascii")


def _rounded(values: Tensor) -> Tensor:
    return values.double().cpu().mul(1e4).round().div(1e4)


def _probability(value: float) -> float:
    return round(min(1.0, max(0.0, value)), 4)


def _likely(other: "Alternative") -> dict[str, Any]:
    return {"text": other.text, "probability": _probability(other.probability)}


def _spread(spread: "Spread") -> dict[str, Any]:
    """The bins around the chosen one, as many below as above where the picture goes on."""
    first = min(max(0, spread.chosen - _BINS // 2), max(0, len(spread.probabilities) - _BINS))
    shown = range(first, min(len(spread.probabilities), first + _BINS))
    return {
        "bins": [[bin, _probability(spread.probabilities[bin])] for bin in shown],
        "mean": round(spread.mean, 2),
        "std": round(spread.std, 2),
    }


def _ban(ban: Ban, found: "Explanation") -> dict[str, Any]:
    """What one rule made impossible; of a forced id it is everything else."""
    if ban.only is not None:
        others = found.config.text.vocab_size - 1
        return {"rule": ban.rule, "count": others, "texts": [f"everything but {found.texts[ban.only]}"]}
    return {"rule": ban.rule, "count": len(ban.ids), "texts": [found.texts[id] for id in ban.ids[:_TEXTS]]}


def _step(step: BeamStep, found: "Explanation") -> dict[str, Any]:
    # what no rule leaves possible is compared only where there is nothing else
    real = [candidate for candidate in step.candidates if candidate.sum > float("-inf") or candidate.beam is not None]
    return {
        "step": step.number,
        "candidates": [_candidate(candidate, step.number, found) for candidate in real],
        "bans": [{"beam": ban.beam, **_ban(ban, found)} for ban in step.bans],
    }


def _candidate(candidate: Candidate, step: int, found: "Explanation") -> dict[str, Any]:
    return {
        "token": candidate.token,
        "text": found.texts[candidate.token],
        "parent": candidate.parent if step else None,
        "beam": candidate.beam,
        "sum": round(max(_LOWEST, candidate.sum), 4),
        "fate": candidate.fate,
    }
