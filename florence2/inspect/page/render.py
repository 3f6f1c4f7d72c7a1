"""An explanation as one HTML page that needs nothing else: no network, no second file."""

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
_PICTURE = re.compile(r"data:image/(?:jpeg|png|webp);base64,[A-Za-z0-9+/]+={0,2}")
_SCRIPTS = ("page_data.js", "page_image.js", "page_panels.js", "page_shape.js", "page_tree.js", "page.js")


@dataclass(frozen=True)
class Keep:
    """How finely the attention maps are kept: cells of `pool` x `pool` of the grid, weights in `levels` steps."""

    pool: int
    levels: int


KEEPS = (Keep(1, 256), Keep(1, 32), Keep(2, 32), Keep(2, 8), Keep(4, 8), Keep(8, 8))
"""What is tried, finest first, until a page is small enough."""


def render_page(explanation: Mapping[str, Any], limit: int = LIMIT) -> str:
    """The page of an explanation (`Explanation.to_dict()`).

    `limit` in bytes: attention maps of a long answer are kept more coarsely until the page is smaller, and the page
    says so; only a picture and texts that are larger by themselves go beyond it. Everything in the explanation is
    data to the page, never markup or script. Raises Florence2Error for another format, or a picture that is none.
    """
    _check(explanation)
    frame, style = read_part("page.html"), read_part("page.css")
    script = "".join(read_part(name) for name in _SCRIPTS)
    parts = {"policy": policy_of(style, script), "style": style, "script": script, **_words(explanation)}
    room = limit - len(frame) - sum(len(part.encode()) for part in parts.values())
    return fill(frame, {**parts, **_pack(explanation, room)})


def decode_map(text: str, *shape: int) -> np.ndarray:
    """A map of an explanation, base64 of bytes, as an array of uint8."""
    return np.frombuffer(base64.b64decode(text), np.uint8).reshape(shape)


def _check(explanation: Mapping[str, Any]) -> None:
    if explanation.get("format") != _FORMAT:
        raise Florence2Error(
            f"The explanation has the format {explanation.get('format')!r}; this version reads {_FORMAT}. Make it anew."
        )
    if not _PICTURE.fullmatch(explanation["image"]["data"]):
        raise Florence2Error(
            f"The explanation's picture begins with {explanation['image']['data'][:30]!r}; it must be a data URL of a "
            "JPEG, PNG or WebP, in base64."
        )


def _words(explanation: Mapping[str, Any]) -> dict[str, str]:
    """What the page says and shows even where no script runs."""
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
    """The data blocks, zlib and base64, the maps as finely as `room` allows."""
    packed: dict[str, str] = {}
    for keep in KEEPS:
        maps, stride = _maps(explanation, keep)
        head = _head(explanation, {"pool": keep.pool, "levels": keep.levels, "stride": stride})
        packed = {"head": _deflated(head), "maps": _deflated(maps)}
        if len(packed["head"]) + len(packed["maps"]) <= room:
            break
    return packed


def _head(explanation: Mapping[str, Any], packing: dict[str, int]) -> bytes:
    """Everything but the picture and the maps, as JSON."""
    image = {key: value for key, value in explanation["image"].items() if key != "data"}
    tokens = []
    for token in explanation["tokens"]:
        attention = {key: token["attention"][key] for key in ("peak", "image")}
        saliency = token["saliency"] and {"prompt": token["saliency"]["prompt"]}
        tokens.append({**token, "attention": attention, "saliency": saliency})
    values = {**explanation, "image": image, "tokens": tokens, "packing": packing}
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def _maps(explanation: Mapping[str, Any], keep: Keep) -> tuple[bytes, int]:
    """The maps of all tokens as bytes, and how many a token takes.

    A token's: layers x heads x cells, layers x heads x prompt tokens, rollout, saliency (zeros where there is none).
    """
    h, w = explanation["image"]["grid"]
    parts = []
    for token in explanation["tokens"]:
        attention, saliency = token["attention"], token["saliency"]
        heads = np.stack([[decode_map(head, h, w) for head in layer] for layer in attention["maps"]])
        parts += [
            _coarser(heads, keep).tobytes(),
            np.array(attention["prompt"], np.uint8).tobytes(),
            decode_map(attention["rollout"], h * w).tobytes(),
            decode_map(saliency["image"], h * w).tobytes() if saliency else bytes(h * w),
        ]
    return b"".join(parts), sum(len(part) for part in parts[:4])


def _coarser(maps: np.ndarray, keep: Keep) -> np.ndarray:
    """Means over `pool` x `pool` cells in `levels` steps, which are narrow where weights are small: there most are.

    (..., h, w) -> (..., ceil(h / pool), ceil(w / pool)), uint8 on the scale that the maps came with.
    """
    if keep == Keep(1, 256):
        return maps
    h, w = maps.shape[-2:]
    down, across = np.arange(0, h, keep.pool), np.arange(0, w, keep.pool)
    sums = np.add.reduceat(np.add.reduceat(maps.astype(np.float32), down, axis=-2), across, axis=-1)
    counts = np.outer(np.diff([*down, h]), np.diff([*across, w]))
    steps = np.rint(np.sqrt(sums / counts / 255) * (keep.levels - 1)) / (keep.levels - 1)
    coarse: np.ndarray = np.rint(steps**2 * 255).astype(np.uint8)
    return coarse


def _deflated(data: bytes) -> str:
    return base64.b64encode(zlib.compress(data, 6)).decode()
