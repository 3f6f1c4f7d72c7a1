"""Three tools for assistants: describe an image, find things in it, read its text."""

import hashlib
import threading
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Literal, TypeAlias

from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations

from florence2 import __version__
from florence2.answers.answer import Answer
from florence2.asking.requests import EncodedImage
from florence2.errors import Florence2Error
from florence2.generation.engine.features import FeatureCache
from florence2.mcp.roots import find_image
from florence2.pipeline import Florence2

KEPT_BYTES = 64 << 20
"""Bytes of encoded images that are kept, 37 of base in float32: the next question about one is answered sooner."""
Box: TypeAlias = tuple[float, float, float, float]
Found: TypeAlias = dict[str, Any]
_READ_ONLY = ToolAnnotations(read_only_hint=True, idempotent_hint=True, open_world_hint=False)
_PATHS = "`image` is the path of an image file: absolute, or relative to one of these folders: {}."
_ANSWER = "The result holds `summary`, a text with one line for each thing, and the same as values; boxes are x1, y1, \
x2, y2 in pixels from the top left corner, and `confidence` is how probable it is that a thing is right, 0 to 1."


class ImageTools:
    """Answers the calls of the tools, one at a time: each uses all cores."""

    def __init__(self, model: Florence2, roots: Sequence[Path]):
        self._model, self._roots, self._lock = model, tuple(roots), threading.Lock()
        self._encoded: FeatureCache[EncodedImage] = FeatureCache(KEPT_BYTES)

    def describe(
        self, image: str, detail: Literal["short", "detailed", "more_detailed"] = "detailed", box: Box | None = None
    ) -> Found:
        """Describe an image in a sentence (short), a few (detailed) or a paragraph, or the content of a box."""
        with self._lock:
            encoded = self._open(image)
            answer = self._model.caption(encoded, detail) if box is None else self._model.describe(encoded, box)
        return _values(answer)

    def find(self, image: str, things: str | None = None) -> Found:
        """Find things in an image and return their boxes: all known things, or those that `things` describes.

        `things` is a phrase or a sentence in plain English, such as "a red car" or "the man and his dog".
        """
        with self._lock:
            encoded = self._open(image)
            answer = self._model.detect(encoded) if things is None else self._model.ground(encoded, things)
        return _values(answer)

    def read(self, image: str, regions: bool = False, box: Box | None = None) -> Found:
        """Read the text in an image: as one text, as lines with their corners (regions), or only inside a box."""
        with self._lock:
            return _values(self._model.ocr(self._open(image), regions=regions, box=box))

    def _open(self, image: str) -> EncodedImage:
        """Read and encode a file; one that was asked about before is not encoded again."""
        prepared = self._model.prepare_image(find_image(image, self._roots))
        key = hashlib.sha256(repr((prepared.pixels.shape, prepared.size)).encode() + prepared.pixels.tobytes()).digest()
        encoded = self._encoded.get(key)
        if encoded is None:
            encoded = self._model.encode_images([prepared])[0]
            self._encoded.put(key, encoded, encoded.features.nbytes)
        return encoded


def make_server(model: Florence2, roots: Sequence[Path]) -> MCPServer:
    """Return a server with the three tools, which reads images below `roots`."""
    tools, paths = ImageTools(model, roots), _PATHS.format(", ".join(map(str, roots)))
    server = MCPServer("florence2", version=__version__, instructions=paths, log_level="ERROR")
    for tool in (tools.describe, tools.find, tools.read):
        text = " ".join((tool.__doc__ or "").split())
        server.add_tool(_in_words(tool), description=f"{text} {paths} {_ANSWER}", annotations=_READ_ONLY)
    return server


def _in_words(tool: Callable[..., Found]) -> Callable[..., Found]:
    """Return the tool with our errors as failures of the call, whose sentences the assistant reads."""

    @wraps(tool)
    def call(*args: Any, **given: Any) -> Found:
        try:
            return tool(*args, **given)
        except Florence2Error as error:
            raise ToolError(str(error)) from None

    return call


def _values(answer: Answer) -> Found:
    return {"summary": str(answer), **answer.to_dict()}
