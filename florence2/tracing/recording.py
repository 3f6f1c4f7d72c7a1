"""`f.trace(...)`: what was computed in a run, by name.

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
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.model.config import Florence2Config
from florence2.model.images import EncodedImage
from florence2.model.trace import Trace, TraceBlock
from florence2.tracing.beams import BeamStep
from florence2.tracing.budget import (
    DEFAULT_LIMIT,
    AnswerSizes,
    answer_bytes,
    check_fits,
    longest_answer,
    picture_bytes,
)
from florence2.tracing.names import Name, names_of, select
from florence2.tracing.owner import Traceable
from florence2.tracing.runs import Run, TracedPicture

Part = TypeVar("Part")


@contextmanager
def trace(f: Traceable, *patterns: str, limit: int = DEFAULT_LIMIT) -> Iterator["Tracing"]:
    """Within the block, keep what `patterns` name (see `florence2.tracing.names`) of every run of `f` in this thread.

    Without a pattern the beams alone are kept. `limit` is in bytes: a run whose values may take more, at its largest
    number of tokens, is refused before it begins. Patches of `f.patched` around or inside the block show. Raises
    OptionError for a pattern that names nothing.
    """
    tracing = Tracing(f.model.config, patterns, limit, _usual_shape(f), f.model.dtype)
    with TraceBlock(f, tracing.start, patches=False):
        yield tracing


def _usual_shape(f: Traceable) -> tuple[int, int, int, int]:
    settings = f.processor.image_config
    return (1, 3, settings.height, settings.width)


class Tracing:
    """What a `trace` block kept: its pictures in the order in which they were encoded, its runs as they were answered.

    `t[name]` and the other shortcuts are those of the only run (or, for what is known of a picture, of the only
    picture); with several, ask `t.runs[i]` and `t.pictures[i]`. A tracing may also be given to the model itself:
    `recording = t.start(); model.decode(ids, memory, trace=recording); recording.values[name]`.
    """

    def __init__(
        self,
        config: Florence2Config,
        patterns: Iterable[str] = (),
        limit: int = DEFAULT_LIMIT,
        pixel_shape: Sequence[int] = (1, 3, 768, 768),
        dtype: torch.dtype = torch.float32,
    ):
        """`pixel_shape` (1, 3, H, W) is what an EncodedImage from before the block is taken to have had."""
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise OptionError(f"limit is {limit!r}; it must be a number of bytes of at least 1.")
        self.config, self.limit, self.pixel_shape, self.dtype = config, limit, tuple(pixel_shape), dtype
        self.known = {name.name: name for name in names_of(config)}
        self.chosen = select(patterns, list(self.known.values()))
        """The names that each pattern selects."""
        chosen = {name for names in self.chosen.values() for name in names}
        self.selected = [name for name in self.known.values() if name.name in chosen or name.searched]
        self.runs: list[Run] = []
        self.pictures: list[TracedPicture] = []
        self.bytes = 0
        """How many bytes are held."""
        self._lock = threading.Lock()

    def start(self) -> "Recording":
        """A trace for one call."""
        return Recording(self)

    @property
    def names(self) -> list[str]:
        """The names that were kept, in the order of computation."""
        parts: list[Run | TracedPicture] = [*self.runs, *self.pictures]
        kept = {name for part in parts for name in part.names}
        return [name for name in self.known if name in kept]

    @property
    def run(self) -> "Run":
        """The only run. Raises OptionError when there is none, or more than one."""
        return _only(self.runs, "runs")

    @property
    def beams(self) -> tuple[BeamStep, ...]:
        """The search's steps in the only run."""
        return self.run.beams

    def __getitem__(self, name: str) -> Tensor:
        """A value of the only run or picture, in the shape `own_shape` of its name."""
        if self.known_name(name).when == "picture" and (len(self.pictures) == 1 or not self.runs):
            return _only(self.pictures, "pictures")[name]
        return self.run[name]

    def along_answer(self, name: str, alternative: int = 0) -> Tensor:
        """See `Run.along_answer`."""
        return self.run.along_answer(name, alternative)

    def known_name(self, name: str) -> Name:
        """What is known of a name. Raises OptionError, naming the nearest, for others."""
        select([name], list(self.known.values()), exactly=True)
        if name not in self.known:
            raise OptionError(f"{name!r} is a pattern; ask for one name at a time.")
        return self.known[name]

    def _hold(self, pictures: Sequence["TracedPicture"], runs: Sequence["Run"], count: int) -> None:
        """Take what one call recorded, `count` bytes."""
        with self._lock:
            self.pictures += pictures
            self.runs += runs
            self.bytes += count


def _only(parts: Sequence[Part], many: str) -> Part:
    if not parts:
        raise OptionError(f"This trace holds no {many}; ask the model something within its block.")
    if len(parts) != 1:
        raise OptionError(f"This trace holds {len(parts)} {many}, not one: choose with t.{many}[number].[...].")
    return parts[0]


class Recording(Trace):
    """The trace of one call: keeps the selected values, a list for each name, in the order in which they came."""

    def __init__(self, tracing: Tracing):
        self.tracing = tracing
        self.values: dict[str, list[Tensor]] = {}
        self._wanted = {name.name for name in tracing.selected}
        self._entered = {
            ".".join(parts[:end])
            for parts in (name.split(".") for name in self._wanted)
            for end in range(1, len(parts))
        }
        self._asked: dict[str, Any] = {}
        self.bytes = 0

    def wants(self, name: str) -> bool:
        return name in self._wanted

    def enters(self, prefix: str) -> bool:
        return prefix in self._entered

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name in self._wanted:
            kept = _without_neighbours(value)
            self._count(kept.nbytes)
            self.values.setdefault(name, []).append(kept)
        return value

    def _count(self, count: int) -> None:
        self.bytes += count
        held, limit = self.tracing.bytes + self.bytes, self.tracing.limit
        if held > limit:  # where nothing was predicted: the model itself was called
            raise OptionError(
                f"The trace holds {held / 1e6:,.1f} MB, more than the limit of {limit / 1e6:,.1f} MB; name less, or "
                "set a higher `limit` (in bytes)."
            )

    def image_started(self, shape: Sequence[int]) -> None:
        """Refuse what would not fit, before anything is computed."""
        t = self.tracing
        self._asked = {"shape": tuple(shape)}
        predicted = picture_bytes(t.selected, t.config, shape, t.dtype)
        what = f"{shape[0]} picture{'s' if shape[0] > 1 else ''} of {shape[2]} x {shape[3]} pixels"
        check_fits(predicted, t.bytes, t.limit, what, "")

    def image_done(self, images: Sequence[EncodedImage]) -> None:
        """Keep what was recorded of these images."""
        shape = self._asked["shape"]
        traced = [TracedPicture(self.tracing, self.values, row, picture, shape) for row, picture in enumerate(images)]
        self.tracing._hold(traced, [], self.bytes)

    def answer_started(
        self, images: Sequence[EncodedImage], prompts: Sequence[Sequence[int]], options: GenerationOptions
    ) -> None:
        """Refuse what would not fit, before anything is computed."""
        t = self.tracing
        self._asked = {"pictures": images, "prompts": prompts, "options": options}
        sizes = AnswerSizes(len(prompts), images[0].features.shape[1], max(map(len, prompts)), options)
        predicted = answer_bytes(t.selected, t.config, sizes, t.dtype)
        longest = longest_answer(t.selected, t.config, sizes, t.dtype, t.limit - t.bytes)
        remedy = f"lower max_new_tokens from {options.max_new_tokens} to {longest}, " if longest else ""
        what = f"{len(prompts)} answer{'s' if len(prompts) > 1 else ''} with {options.num_beams} beams"
        check_fits(predicted, t.bytes, t.limit, what, remedy)

    def answer_done(self, answers: Sequence[Answer]) -> None:
        """Keep what was recorded of these requests."""
        runs = [Run(self.tracing, self.values, row, answer, **self._asked) for row, answer in enumerate(answers)]
        self.tracing._hold([], runs, self.bytes)


def _without_neighbours(value: Tensor) -> Tensor:
    """The value, copied when it is part of something larger that would be held with it."""
    if value.requires_grad or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    return value.clone()
