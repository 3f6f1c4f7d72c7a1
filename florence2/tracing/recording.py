"""`f.trace(...)`: keep what a run computes, by name.

    with f.trace("decoder.layers.*.cross_attention", "=encoder.layers.*") as t:
        f.run("<CAPTION>", "photo.jpg")
    t["decoder.layers.0.cross_attention.weights"]               # (steps, heads, K, S): every beam at every step
    t.along_answer("decoder.layers.0.cross_attention.weights")  # (T, heads, S): the beams that wrote the answer
    t.beams                                                     # what the search compared and chose

Nothing is hooked: model code shows its values to the trace that it is given (see `florence2.model.trace`). Values stay
on their device, in their type, and keep their graph where gradients are on.
"""

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from florence2.answers.answer import Answer
from florence2.asking.requests import EncodedImage
from florence2.errors import OptionError, plain
from florence2.generation.options import GenerationOptions
from florence2.model.config import Florence2Config
from florence2.model.trace import Trace, TraceBlock
from florence2.tracing.beams import BeamStep
from florence2.tracing.budget import (
    DEFAULT_LIMIT,
    AnswerSizes,
    answer_bytes,
    check_fits,
    image_bytes,
    longest_answer,
)
from florence2.tracing.owner import Traceable
from florence2.tracing.runs import Run, TracedImage
from florence2.tracing.selection import Selection, Unknown, prefixes, warn_not_recorded

Part = TypeVar("Part")


@contextmanager
def trace(f: Traceable, *patterns: str, limit: int = DEFAULT_LIMIT, unknown: Unknown = "refuse") -> Iterator["Tracing"]:
    """Keep named values of every run of `f` within the block, in this thread or task; `f.trace(...)` is the same.

    Patches of `f.patched` show, wherever their blocks are. At the end of the block a `NotRecordedWarning` tells which
    patterns named nothing that its runs recorded.

    Args:
        f: The `Florence2` whose runs are traced.
        patterns: Names or patterns (see `florence2.tracing.names`). Without any, only the beams are kept.
        limit: A number of bytes. A run whose values may take more, at its largest number of tokens, is refused before
            it begins.
        unknown: "allow" also accepts patterns that the table of names does not have, and keeps what modules of your
            own record under such names (`trace("adapter", x)` in their `forward`). Their bytes cannot be predicted.

    Yields:
        The `Tracing` that holds the values.

    Raises:
        OptionError: A pattern selects nothing, or `limit` or `unknown` has a wrong value.
    """
    settings = f.processor.image_config
    size = settings.height, settings.width
    tracing = Tracing(f.model.config, patterns, limit, size, f.model.dtype, unknown)
    with TraceBlock(f, tracing.start, patches=False):
        yield tracing
    if tracing.runs or tracing.images:
        recorded = tracing._recorded()
        warn_not_recorded("trace", tracing.selection.open.complete(tracing.chosen, recorded), recorded, stacklevel=3)


class Tracing:
    """The values that a `trace` block kept: its images in the order of encoding, its runs in the order of answering.

    `t[name]`, `t.along_answer(name)` and `t.beams` are those of the only run (or, for values of an image, of the only
    image). With several, choose with `t.runs[i]` and `t.images[i]`. A tracing may also be given to the model itself:
    `recording = t.start(); model.decode(ids, memory, trace=recording); recording.values[name]`.

    Attributes:
        runs: A `Run` for each answered request.
        images: A `TracedImage` for each encoded image.
        chosen: The names that each pattern selects.
        bytes: The bytes held so far.
    """

    def __init__(
        self,
        config: Florence2Config,
        patterns: Iterable[str] = (),
        limit: int = DEFAULT_LIMIT,
        usual_size: tuple[int, int] = (768, 768),
        dtype: torch.dtype = torch.float32,
        unknown: Unknown = "refuse",
    ):
        """`usual_size` (H, W) is assumed for an EncodedImage that was made before the block."""
        limit = plain(limit)
        if type(limit) is not int or limit < 1:
            raise OptionError(f"limit is {limit!r}; it must be a number of bytes of at least 1.")
        self.config, self.limit, self.dtype = config, limit, dtype
        self.selection = Selection(config, patterns, usual_size, unknown)
        self.known, self.chosen = self.selection.known, self.selection.by_pattern
        self.selected = self.selection.names
        self.runs: list[Run] = []
        self.images: list[TracedImage] = []
        self.bytes = 0
        self._lock = threading.Lock()

    def start(self) -> "Recording":
        """Return a trace for one call."""
        return Recording(self)

    @property
    def names(self) -> list[str]:
        """The names that were kept, in the order of computation; those that the table does not have come last."""
        recorded = self._recorded()
        known = [name for name, entry in self.known.items() if name in recorded and not entry.searched]
        return [*known, *(name for name in recorded if name not in self.known)]

    def _recorded(self) -> dict[str, None]:
        """Return every name of any part, those of the search included, in the order of recording."""
        parts: list[Run | TracedImage] = [*self.images, *self.runs]
        return dict.fromkeys(name for part in parts for name in part.values)

    @property
    def run(self) -> Run:
        """The only run. Raises OptionError when the trace holds none or several."""
        return _only(self.runs, "runs")

    @property
    def beams(self) -> tuple[BeamStep, ...]:
        """The steps of the search in the only run."""
        return self.run.beams

    def __getitem__(self, name: str) -> Tensor:
        """Return one value of the only run or image, in the shape `own_shape` of its name."""
        if self._is_of_images(name) and (len(self.images) == 1 or not self.runs):
            return _only(self.images, "images")[name]
        return self.run[name]

    def _is_of_images(self, name: str) -> bool:
        """Return whether images have this value. Raises OptionError for a name that does not exist."""
        if name in self.known or name not in self._recorded():
            return self.selection.find(name).when == "image"
        return any(name in image.values for image in self.images)

    def along_answer(self, name: str, alternative: int = 0) -> Tensor:
        """Return a value in the beams that wrote the answer of the only run; see `Run.along_answer`."""
        return self.run.along_answer(name, alternative)

    def _hold(self, images: Sequence[TracedImage], runs: Sequence[Run], count: int) -> None:
        """Take over what one call recorded, `count` bytes."""
        with self._lock:
            self.images += images
            self.runs += runs
            self.bytes += count


def _only(parts: Sequence[Part], plural: str) -> Part:
    if not parts:
        raise OptionError(f"This trace holds no {plural}; run the model within its block.")
    if len(parts) != 1:
        raise OptionError(f"This trace holds {len(parts)} {plural}, not one; choose with t.{plural}[number].[...].")
    return parts[0]


class Recording(Trace):
    """The trace of one call: keeps the selected values, a list for each name, in the order of computation."""

    def __init__(self, tracing: Tracing):
        self.tracing = tracing
        self.values: dict[str, list[Tensor]] = {}
        self._wanted = {name.name for name in tracing.selected}
        self._entered = prefixes(self._wanted)
        self._open = tracing.selection.open
        self._asked: dict[str, Any] = {}
        self.bytes = 0

    def wants(self, name: str) -> bool:
        return name in self._wanted or bool(self._open.matching(name))

    def enters(self, prefix: str) -> bool:
        return prefix in self._entered or self._open.enters(prefix)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if self.wants(name):
            kept = _without_neighbours(value)
            self._count(kept.nbytes)
            self.values.setdefault(name, []).append(kept)
        return value

    def _count(self, count: int) -> None:
        self.bytes += count
        held, limit = self.tracing.bytes + self.bytes, self.tracing.limit
        if held > limit:  # only when the model itself is called, since then nothing was predicted
            raise OptionError(
                f"The trace holds {held / 1e6:,.1f} MB, more than the limit of {limit / 1e6:,.1f} MB; name fewer "
                "values, or set a higher `limit` (in bytes)."
            )

    def image_started(self, shape: Sequence[int]) -> None:
        """Refuse what would not fit, before anything is computed."""
        t = self.tracing
        self._asked = {"shape": tuple(shape)}
        predicted = image_bytes(t.selected, t.config, shape, t.dtype)
        subject = f"{shape[0]} image{'s' if shape[0] > 1 else ''} of {shape[2]} x {shape[3]} pixels"
        check_fits(predicted, t.bytes, t.limit, subject, "")

    def image_done(self, images: Sequence[EncodedImage]) -> None:
        """Keep what was recorded of these images."""
        shape = self._asked["shape"]
        t = self.tracing
        traced = [TracedImage(t.selection, self.values, row, image, shape) for row, image in enumerate(images)]
        t._hold(traced, [], self.bytes)

    def answer_started(
        self, images: Sequence[EncodedImage], prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> None:
        """Refuse what would not fit, before anything is computed."""
        t = self.tracing
        self._asked = {"images": images, "prompts": prompts, "options": options}
        sizes = AnswerSizes(len(prompts), images[0].features.shape[1], max(map(len, prompts)), options)
        predicted = answer_bytes(t.selected, t.config, sizes, t.dtype)
        longest = longest_answer(t.selected, t.config, sizes, t.dtype, t.limit - t.bytes)
        remedy = f"lower max_new_tokens from {options.max_new_tokens} to {longest}, " if longest else ""
        subject = f"{len(prompts)} answer{'s' if len(prompts) > 1 else ''} with {options.num_beams} beams"
        check_fits(predicted, t.bytes, t.limit, subject, remedy)

    def answer_done(self, answers: Sequence[Answer]) -> None:
        """Keep what was recorded of these requests."""
        t = self.tracing
        runs = [Run(t.selection, self.values, row, one, t.images, **self._asked) for row, one in enumerate(answers)]
        t._hold([], runs, self.bytes)


def _without_neighbours(value: Tensor) -> Tensor:
    """Return the value, copied when it is a view of a larger tensor that would be held in memory with it."""
    if value.requires_grad or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    return value.clone()
