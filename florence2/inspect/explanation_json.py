"""The plain JSON of an explanation, which the report page and other programs read.

    format, model, image, task, prompt, answer     the request, the model, and its answer
    tokens[n]                                      one entry for each token of the answer, the end included
      .alternatives .banned .lens .spread          other ids, banned ids, each layer's prediction, other locations
      .attention .saliency                         where it attended, and on what it depends
    beams[n]                                       what each step of the search compared; `winner` is the beam that
                                                   wrote each token: the `parent` of its candidate in step n

Maps are bytes in base64, row by row: a weight is byte / 255 x `peak`, where `peak` is the largest weight of this token,
layer and head over places and prompt. A rollout is scaled by its own maximum, and so is the absolute saliency of a
cell. Numbers are finite, and probabilities are rounded to four digits.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from florence2.answers.answer import Answer, Box, Polygon, Quad
from florence2.inspect.attention import AttentionMaps
from florence2.inspect.explanation_parts import Alternative, ExplainedRegion, ExplainedToken, Spread
from florence2.inspect.saliency import Saliency
from florence2.model.config import Florence2Config, VisionConfig
from florence2.tracing.beams import Ban, BeamStep, Candidate

FORMAT = 1
MAX_SIDE = 1024
_BINS, _TEXTS = 40, 8
_LOWEST = -1e9  # a sum that is as low as the search itself gives to a beam that cannot win


def model_values(name: str, config: Florence2Config) -> dict[str, Any]:
    """Return the entry of the model."""
    return {
        "name": name,
        "layers": config.text.decoder_layers,
        "heads": config.text.decoder_attention_heads,
        "vision": _describe_vision(config.vision),
    }


def image_values(image: Image.Image, size: tuple[int, int], attention: AttentionMaps) -> dict[str, Any]:
    """Return the entry of the image; `size` is (width, height) in pixels."""
    h, w = attention.places.shape[-2:]
    pooled = attention.pooled.shape[-1]
    return {"width": size[0], "height": size[1], "grid": [h, w], "pooled": pooled, "data": image_data(image)}


def image_data(image: Image.Image) -> str:
    """Return an image as a data URI of a JPEG whose longer side is at most MAX_SIDE pixels."""
    small = image.copy()
    small.thumbnail((MAX_SIDE, MAX_SIDE))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"


def _describe_vision(vision: VisionConfig) -> str:
    widths, depths = ("-".join(map(str, sizes)) for sizes in (vision.dim_embed, vision.depths))
    return f"DaViT, widths {widths}, depths {depths}, windows of {vision.window_size}"


def answer_values(answer: Answer, regions: Sequence[ExplainedRegion]) -> dict[str, Any]:
    """Return the entry of the answer."""
    shapes: dict[type, list[dict[str, Any]]] = {Box: [], Quad: [], Polygon: []}
    for region in regions:
        plain = {
            "label": region.shape.label,
            "score": None if region.shape.score is None else _probability(region.shape.score),
            "confidence": _confidence(region),
            "tokens": [region.tokens[0], region.tokens[-1]],
            **_points(region.shape),
        }
        shapes[type(region.shape)].append(plain)
    return {
        "kind": answer.kind,
        "text": answer.text,
        "score": None if answer.score is None else _probability(answer.score),
        "confidence": None if answer.confidence is None else _probability(answer.confidence),
        "calibrated": answer.calibrated,
        "finish_reason": answer.finish_reason,
        "boxes": shapes[Box],
        "quads": shapes[Quad],
        "polygons": shapes[Polygon],
    }


def _confidence(region: ExplainedRegion) -> dict[str, Any] | None:
    """Return a region's confidence and its parts: the label's probability, and that near each of its locations."""
    if region.shape.confidence is None or region.parts is None:
        return None
    return {
        "value": _probability(region.shape.confidence),
        "label": _probability(region.parts.label),
        "near": [_probability(share) for share in region.parts.near],
    }


def _points(shape: Box | Quad | Polygon) -> dict[str, Any]:
    """Return a box's corners, a quad's four points, or a polygon's rings of points."""
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


def token_values(token: ExplainedToken, bans: "BanValues") -> dict[str, Any]:
    """Return the entry of one token, without its maps."""
    return {
        "id": token.id,
        "text": token.text,
        "probability": _probability(token.probability),
        "location": None if token.spread is None else token.spread.chosen,
        "alternatives": [{"id": other.id, **_likely(other)} for other in token.alternatives],
        "banned": [bans.of(ban) for ban in token.bans],
        "lens": [[_likely(other) for other in depth] for depth in token.lens],
        "spread": None if token.spread is None else _spread(token.spread),
    }


@dataclass(frozen=True)
class _Quantised:
    """Values of all tokens as bytes, with the peaks by which they are scaled."""

    places: Tensor  # (T, ..., h, w) uint8
    prompt: Tensor  # (T, ..., P) uint8
    peak: Tensor  # (T, ...)


class TokenMaps:
    """The maps of all tokens, in bytes."""

    def __init__(self, attention: AttentionMaps, rollout: AttentionMaps, saliency: Saliency | None):
        self.attention = _quantise(attention.places, attention.prompt)
        places = rollout.places
        self.rollout = _quantise(places, places.new_zeros(len(places), 0)).places
        self.shares = _rounded(attention.image_share)
        h, w = places.shape[-2:]
        self.saliency = {} if saliency is None else _saliency(saliency, (h, w))

    def of(self, n: int) -> dict[str, Any]:
        """Return the maps of token n."""
        maps = self.attention
        attention = {
            "peak": [[float(f"{value:.4g}") for value in layer] for layer in maps.peak[n].tolist()],
            "image": self.shares[n].tolist(),
            "maps": [[_bytes(head) for head in layer] for layer in maps.places[n]],
            "prompt": maps.prompt[n].tolist(),
            "rollout": _bytes(self.rollout[n]),
        }
        return {"attention": attention, "saliency": self.saliency.get(n)}


def _saliency(saliency: Saliency, grid: tuple[int, int]) -> dict[int, dict[str, Any]]:
    """Return the saliency by token: cells of the image as bytes, words of the prompt as numbers."""
    cells = saliency.by_cell(grid).abs()
    maps = _quantise(cells, cells.new_zeros(len(cells), 0)).places
    words = [[float(f"{value:.4g}") for value in row] for row in saliency.prompt.tolist()]
    return {token: {"image": _bytes(maps[i]), "prompt": words[i]} for i, token in enumerate(saliency.tokens)}


def _quantise(places: Tensor, prompt: Tensor) -> _Quantised:
    """Scale weights of places (..., h, w) and prompt (..., P), none negative, by the larger maximum of both."""
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


def _likely(other: Alternative) -> dict[str, Any]:
    return {"text": other.text, "probability": _probability(other.probability)}


def _spread(spread: Spread) -> dict[str, Any]:
    """Return the bins around the chosen one, as many below as above except at the border of the image."""
    first = min(max(0, spread.chosen - _BINS // 2), max(0, len(spread.probabilities) - _BINS))
    shown = range(first, min(len(spread.probabilities), first + _BINS))
    return {
        "bins": [[bin, _probability(spread.probabilities[bin])] for bin in shown],
        "mean": round(spread.mean, 2),
        "std": round(spread.std, 2),
    }


class BanValues:
    """The entries of bans, which need the texts of the ids."""

    def __init__(self, texts: Mapping[int, str], vocab_size: int):
        self.texts, self.vocab_size = texts, vocab_size

    def of(self, ban: Ban) -> dict[str, Any]:
        """Return the entry of one ban; a forced id bans every other id."""
        if ban.only is not None:
            only = f"everything but {self.texts[ban.only]}"
            return {"rule": ban.rule, "count": self.vocab_size - 1, "texts": [only]}
        return {"rule": ban.rule, "count": len(ban.ids), "texts": [self.texts[id] for id in ban.ids[:_TEXTS]]}


def step_values(step: BeamStep, bans: BanValues) -> dict[str, Any]:
    """Return the entry of one step of the search."""
    # the search compares impossible candidates only when too few possible ones are left
    real = [candidate for candidate in step.candidates if candidate.sum > float("-inf") or candidate.beam is not None]
    return {
        "step": step.number,
        "candidates": [_candidate(candidate, step.number, bans.texts) for candidate in real],
        "bans": [{"beam": ban.beam, **bans.of(ban)} for ban in step.bans],
    }


def _candidate(candidate: Candidate, step: int, texts: Mapping[int, str]) -> dict[str, Any]:
    return {
        "token": candidate.token,
        "text": texts[candidate.token],
        "parent": candidate.parent if step else None,
        "beam": candidate.beam,
        "sum": round(max(_LOWEST, candidate.sum), 4),
        "fate": candidate.fate,
    }
