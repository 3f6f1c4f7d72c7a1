"""Render an explanation as one HTML page that needs nothing else: no network, no second file."""

import base64
import html
import json
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from florence2.errors import Florence2Error
from florence2.inspect.page.parts import fill, policy_of, read_part

LIMIT = 5_000_000
_FORMAT = 1
_IMAGE = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SCRIPTS = ("page_data.js", "page_image.js", "page_panels.js", "page_shape.js", "page_tree.js", "page.js")


@dataclass(frozen=True)
class Precision:
    """The precision of the attention maps: cells of `pool` x `pool` of the grid, weights in `levels` steps."""

    pool: int
    levels: int


PRECISIONS = tuple(Precision(*pair) for pair in ((1, 256), (1, 32), (2, 32), (2, 8), (4, 8), (8, 8)))
"""The precisions to try, finest first, until a page is small enough."""


def render_page(explanation: Mapping[str, Any], limit: int = LIMIT) -> str:
    """Render the page of an explanation.

    Everything in the explanation is data to the page, never markup or script.

    Args:
        explanation: `Explanation.to_dict()`.
        limit: The size of the page in bytes. Attention maps of a long answer are stored more coarsely until the page
            fits, and the page says so. Only an image and texts that are larger by themselves exceed it.

    Returns:
        The HTML.

    Raises:
        Florence2Error: The explanation has another format, or its image is not a data URL of an image.
    """
    _check(explanation)
    frame, style = read_part("page.html"), read_part("page.css")
    script = "".join(read_part(name) for name in _SCRIPTS)
    parts = {"policy": policy_of(style, script), "style": style, "script": script, **_words(explanation)}
    room = limit - len(frame) - sum(len(part.encode(errors="backslashreplace")) for part in parts.values())
    return fill(frame, {**parts, **_pack(explanation, room)})


def decode_map(text: str, *shape: int) -> np.ndarray:
    """Decode a map of an explanation, bytes in base64, to an array of uint8."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def _check(explanation: Mapping[str, Any]) -> None:
    if explanation.get("format") != _FORMAT:
        raise Florence2Error(
            f"The explanation has the format {explanation.get('format')!r}; this version reads {_FORMAT}. Create it "
            "again."
        )
    if not _IMAGE.fullmatch(explanation["image"]["data"]):
        raise Florence2Error(
            f"The explanation's image begins with {explanation['image']['data'][:30]!r}; it must be a data URL of a "
            "JPEG, PNG or WebP, in base64."
        )


def _words(explanation: Mapping[str, Any]) -> dict[str, str]:
    """Return the parts of the page that are visible even without its script."""
    image, model = explanation["image"], explanation["model"]
    words = {
        "task": explanation["task"],
        "model": model["name"],
        "shape": f"decoder layers: {model['layers']}, heads: {model['heads']}",
        "prompt": "".join(token["text"] for token in explanation["prompt"]),
        "answer": explanation["answer"]["text"],
        "image": image["data"],
        "width": str(image["width"]),
        "height": str(image["height"]),
    }
    return {name: html.escape(text) for name, text in words.items()}


def _pack(explanation: Mapping[str, Any], room: int) -> dict[str, str]:
    """Return the data blocks, zlib and base64, with maps as precise as `room` allows."""
    packed: dict[str, str] = {}
    for precision in PRECISIONS:
        maps, stride = _maps(explanation, precision)
        head = _head(explanation, {"pool": precision.pool, "levels": precision.levels, "stride": stride})
        packed = {"head": _deflated(head), "maps": _deflated(maps)}
        if len(packed["head"]) + len(packed["maps"]) <= room:
            break
    return packed


def _head(explanation: Mapping[str, Any], packing: dict[str, int]) -> bytes:
    """Return everything except the image and the maps, as JSON."""
    image = {key: value for key, value in explanation["image"].items() if key != "data"}
    tokens = []
    for token in explanation["tokens"]:
        attention = {key: token["attention"][key] for key in ("peak", "image")}
        saliency = token["saliency"] and {"prompt": token["saliency"]["prompt"]}
        tokens.append({**token, "attention": attention, "saliency": saliency})
    values = {**explanation, "image": image, "tokens": tokens, "packing": packing}
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
        errors="backslashreplace"  # of half a character this makes an escape that JSON has too
    )


def _maps(explanation: Mapping[str, Any], precision: Precision) -> tuple[bytes, int]:
    """Return the maps of all tokens as bytes, and the number of bytes of one token.

    Each token has layers x heads x cells, layers x heads x prompt tokens, rollout, and saliency (zeros without one).
    """
    h, w = explanation["image"]["grid"]
    parts = []
    for token in explanation["tokens"]:
        attention, saliency = token["attention"], token["saliency"]
        heads = np.stack([[decode_map(head, h, w) for head in layer] for layer in attention["maps"]])
        parts += [
            _coarser(heads, precision).tobytes(),
            np.array(attention["prompt"], np.uint8).tobytes(),
            decode_map(attention["rollout"], h * w).tobytes(),
            decode_map(saliency["image"], h * w).tobytes() if saliency else bytes(h * w),
        ]
    return b"".join(parts), sum(len(part) for part in parts[:4])


def _coarser(maps: np.ndarray, precision: Precision) -> np.ndarray:
    """Average `pool` x `pool` cells and round to `levels` steps: (..., h, w) -> (..., ceil(h / pool), ceil(w / pool)).

    Steps are narrower for small weights, where most weights are. The result is uint8 on the scale of the input.
    """
    if precision == PRECISIONS[0]:
        return maps
    pool, top = precision.pool, precision.levels - 1
    h, w = maps.shape[-2:]
    down, across = np.arange(0, h, pool), np.arange(0, w, pool)
    sums = np.add.reduceat(np.add.reduceat(maps.astype(np.float32), down, axis=-2), across, axis=-1)
    counts = np.outer(np.diff([*down, h]), np.diff([*across, w]))
    steps = np.rint(np.sqrt(sums / counts / 255) * top) / top
    coarse: np.ndarray = np.rint(steps**2 * 255).astype(np.uint8)
    return coarse


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()
