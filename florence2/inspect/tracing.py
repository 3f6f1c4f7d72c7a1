"""`f.trace(...)`: what was computed in a run, by name.

    with f.trace("decoder.layers.*.cross_attention", "=encoder.layers.*") as t:
        f.run("<CAPTION>", "photo.jpg")
    t["decoder.layers.0.cross_attention.weights"]               # (steps, heads, K, S): every beam at every step
    t.along_answer("decoder.layers.0.cross_attention.weights")  # (T, heads, S): the beams that wrote the answer
    t.beams                                                     # what the search compared and chose

Nothing is hooked: model code shows its values to a trace that is handed down to it, as `florence2.trace` says. The
values stay on the device and in the type in which they were computed, and keep their graph where gradients are on.
"""

import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from florence2.answers import Answer
from florence2.config import Florence2Config
from florence2.decoding import GenerationOptions
from florence2.errors import OptionError
from florence2.inspect.beams import BeamStep, read_beams, rows_of
from florence2.inspect.budget import (
    DEFAULT_LIMIT,
    AnswerSizes,
    answer_bytes,
    check_fits,
    longest_answer,
    picture_bytes,
)
from florence2.inspect.names import Name, names_of, pooled_spans, select
from florence2.pipeline import EncodedImage, Florence2
from florence2.trace import in_force


@contextmanager
def trace(f: Florence2, *patterns: str, limit: int = DEFAULT_LIMIT) -> Iterator["Tracing"]:
    """Within the block, keep what `patterns` name (see `florence2.inspect.names`) of every run of `f` in this thread.

    Without a pattern the beams alone are kept. `limit` is in bytes: a run whose values may take more, at its largest
    number of tokens, is refused before it begins. Patches of `f.patched` around or inside the block show. Raises
    OptionError for a pattern that names nothing.
    """
    tracing = Tracing(f.model.config, patterns, limit, _usual_shape(f), f.model.dtype)
    with in_force(f, tracing.start, changes=False):
        yield tracing


def _usual_shape(f: Florence2) -> tuple[int, int, int, int]:
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
        kept = {name for part in (*self.runs, *self.pictures) for name in part.names}
        return [name for name in self.known if name in kept]

    @property
    def run(self) -> "Run":
        """The only run. Raises OptionError when there is none, or more than one."""
        return _only(self.runs, "run", "runs")

    @property
    def beams(self) -> tuple[BeamStep, ...]:
        """The search's steps in the only run."""
        return self.run.beams

    def __getitem__(self, name: str) -> Tensor:
        """A value of the only run or picture, in the shape `own_shape` of its name."""
        if self.known_name(name).when == "picture" and (len(self.pictures) == 1 or not self.runs):
            return _only(self.pictures, "picture", "pictures")[name]
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


def _only(parts: Sequence[Any], one: str, many: str) -> Any:
    if len(parts) != 1:
        raise OptionError(f"This trace holds {len(parts)} {many}, not one: choose with t.{many}[number].[...].")
    return parts[0]


class Recording:
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

    def note(self, event: str, **facts: Any) -> None:
        getattr(self, f"_note_{event}")(**facts)

    def _count(self, count: int) -> None:
        self.bytes += count
        held, limit = self.tracing.bytes + self.bytes, self.tracing.limit
        if held > limit:  # where nothing was predicted: the model itself was called
            raise OptionError(
                f"The trace holds {held / 1e6:,.1f} MB, more than the limit of {limit / 1e6:,.1f} MB; name less, or "
                "set a higher `limit` (in bytes)."
            )

    def _note_encodes(self, shape: torch.Size) -> None:
        t = self.tracing
        self._asked = {"shape": tuple(shape)}
        predicted = picture_bytes(t.selected, t.config, shape, t.dtype)
        what = f"{shape[0]} picture{'s' if shape[0] > 1 else ''} of {shape[2]} x {shape[3]} pixels"
        check_fits(predicted, t.bytes, t.limit, what, "")

    def _note_encoded(self, pictures: Sequence[EncodedImage]) -> None:
        shape = self._asked["shape"]
        traced = [TracedPicture(self.tracing, self.values, row, picture, shape) for row, picture in enumerate(pictures)]
        self.tracing._hold(traced, [], self.bytes)

    def _note_asks(
        self, pictures: Sequence[EncodedImage], prompts: Sequence[list[int]], options: GenerationOptions
    ) -> None:
        t = self.tracing
        self._asked = {"pictures": pictures, "prompts": prompts, "options": options}
        sizes = AnswerSizes(len(prompts), pictures[0].features.shape[1], max(map(len, prompts)), options)
        predicted = answer_bytes(t.selected, t.config, sizes, t.dtype)
        longest = longest_answer(t.selected, t.config, sizes, t.dtype, t.limit - t.bytes)
        remedy = f"lower max_new_tokens from {options.max_new_tokens} to {longest}, " if longest else ""
        what = f"{len(prompts)} answer{'s' if len(prompts) > 1 else ''} with {options.num_beams} beams"
        check_fits(predicted, t.bytes, t.limit, what, remedy)

    def _note_answers(self, answers: Sequence[Answer]) -> None:
        runs = [Run(self.tracing, self.values, row, answer, **self._asked) for row, answer in enumerate(answers)]
        self.tracing._hold([], runs, self.bytes)


def _without_neighbours(value: Tensor) -> Tensor:
    """The value, copied when it is part of something larger that would be held with it."""
    if value.requires_grad or value.untyped_storage().nbytes() <= value.nbytes:
        return value
    return value.clone()


class TracedPicture:
    """What a trace kept of one picture on its way through the vision tower and the projection."""

    def __init__(
        self,
        tracing: Tracing,
        values: Mapping[str, Sequence[Tensor]],
        row: int,
        encoded: EncodedImage,
        pixel_shape: Sequence[int],
    ):
        self.tracing, self.values, self.row = tracing, values, row
        self.encoded = encoded
        """What the pipeline goes on with."""
        self.pixel_shape = tuple(pixel_shape)
        """(B, 3, H, W) of the batch that it was in."""

    @property
    def names(self) -> list[str]:
        """The names that were kept."""
        return list(self.values)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last stage, and so of the image tokens."""
        return self.tracing.config.vision.grid_size(self.pixel_shape[2], self.pixel_shape[3])

    def __getitem__(self, name: str) -> Tensor:
        """One value, in the shape `own_shape` of its name: that of the table, without the pictures beside it."""
        known = self.tracing.known_name(name)
        return _alone(self.batched(name)[0], known)

    def batched(self, name: str) -> list[Tensor]:
        """The value as it was recorded, of a batch of this picture alone."""
        value, known = _kept(self.values, name, self.tracing)[0], self.tracing.known_name(name)
        return [_rows(value, self.row, self.pixel_shape[0])]


class Run:
    """One request, answered: what was asked, what was computed, what was answered.

    Values are those of this request alone: what its batch holds beside it, other requests, padding of its prompt,
    steps after its end, is left out, so they are what they are when it is asked alone.
    """

    def __init__(
        self,
        tracing: Tracing,
        values: Mapping[str, Sequence[Tensor]],
        row: int,
        answer: Answer,
        pictures: Sequence[EncodedImage],
        prompts: Sequence[list[int]],
        options: GenerationOptions,
    ):
        self.tracing, self.values, self.row, self.batch = tracing, values, row, len(prompts)
        self.answer, self.options = answer, options
        self.encoded = pictures[row]
        """The picture, as the encoder was given it."""
        self.prompt_ids = tuple(prompts[row])
        self.image_size = self.encoded.size
        """(width, height) of the upright picture in pixels."""
        self.image_tokens = self.encoded.features.shape[1]

    @property
    def names(self) -> list[str]:
        """The names that were kept, those of its picture too."""
        picture = self._find_picture()
        return [*(picture.names if picture else ()), *self.values]

    @property
    def picture(self) -> TracedPicture:
        """The picture's own values. Raises OptionError when it was encoded outside of the block."""
        found = self._find_picture()
        if found is None:
            raise OptionError("This run's picture was encoded outside of the trace; encode it within the block.")
        return found

    def _find_picture(self) -> TracedPicture | None:
        return next((p for p in self.tracing.pictures if p.encoded is self.encoded), None)

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens in `grid_span`."""
        picture = self._find_picture()
        shape = self.tracing.pixel_shape if picture is None else picture.pixel_shape
        grid = self.tracing.config.vision.grid_size(shape[2], shape[3])
        if max(span.stop for span in pooled_spans(self.tracing.config.vision, grid).values()) != self.image_tokens:
            raise OptionError(
                f"The picture has {self.image_tokens} image tokens, which are not those of {shape[2]} x {shape[3]} "
                "pixels, so its grid is not known; encode it within the block."
            )
        return grid

    @property
    def image_spans(self) -> dict[str, slice]:
        """Where in the memory each way of pooling has its tokens: as published, the mean of all at 0, then the grid."""
        return pooled_spans(self.tracing.config.vision, self.image_grid)

    @property
    def grid_span(self) -> slice:
        """Where in the memory the tokens are that stand for places: h·w of them, row by row."""
        spans = self.image_spans
        return next(spans[source] for source in spans if source != "spatial_avg_pool")

    @property
    def prompt_span(self) -> slice:
        """Where in the memory the prompt is."""
        return slice(self.image_tokens, self.image_tokens + len(self.prompt_ids))

    @cached_property
    def beams(self) -> tuple[BeamStep, ...]:
        """The search's steps, until this request was settled."""
        return read_beams(self.values, self.row, self.options, self.tracing.config.text)

    def answer_ids(self, alternative: int = 0) -> tuple[int, ...]:
        """The generated ids, without the start id: T of them. `alternative` above 0 is one of `answer.alternatives`."""
        found = (self.answer, *self.answer.alternatives)
        if not 0 <= alternative < len(found):
            raise OptionError(f"There is no alternative {alternative}; this run has {len(found)} answers, from 0.")
        return tuple(found[alternative].token_ids[1:])

    def rows(self, alternative: int = 0) -> tuple[int, ...]:
        """Which beam wrote each of `answer_ids`: token n was computed in row `rows[n]` of step n."""
        found = rows_of(self.beams, self.answer_ids(alternative))
        assert found is not None, "an answer is what some beam wrote"
        return found

    def __getitem__(self, name: str) -> Tensor:
        """One value, in the shape `own_shape` of its name: steps first, if it is computed at every step.

        Weights of the decoder's self-attention are of each beam's own past: (steps, heads, K, steps), zero where the
        past has not come. Raises OptionError for a name that does not exist or was not kept.
        """
        known = self.tracing.known_name(name)
        if known.when == "picture":
            return self.picture[name]
        if known.searched:
            raise OptionError(f"{name!r} is part of the search, which `beams` gives.")
        steps = [_alone(value, known) for value in self.batched(name)]
        if known.when != "step":
            return steps[0]
        if known.shape[-1] == "t·K":
            steps = [_of_own_past(step, len(self.beams)) for step in steps]
        return torch.stack(steps)

    def batched(self, name: str) -> list[Tensor]:
        """The values as they were recorded, one for each step, of a batch of this request alone."""
        values, known = _kept(self.values, name, self.tracing), self.tracing.known_name(name)
        last = len(self.beams) if known.when == "step" else 1
        return [_cut(_rows(value, self.row, self.batch), known.shape, self._lengths()) for value in values[:last]]

    def _lengths(self) -> dict[str, int]:
        return {"S": self.prompt_span.stop, "P": len(self.prompt_ids)}

    def along_answer(self, name: str, alternative: int = 0) -> Tensor:
        """A value of every step in the beam that wrote the answer: (T, ...), K left out of the shape of `run[name]`.

        Entry n is of the step that computed `answer_ids()[n]`.
        """
        letters = self.tracing.known_name(name).own_shape
        if "K" not in letters:
            raise OptionError(f"{name!r} is not computed for every token of the answer; ask for it as run[name].")
        rows, values = self.rows(alternative), self[name]
        found = torch.stack([values[n].select(letters.index("K") - 1, row) for n, row in enumerate(rows)])
        return found[..., : len(rows)] if letters[-1] == "steps" else found


def _kept(values: Mapping[str, Sequence[Tensor]], name: str, tracing: Tracing) -> Sequence[Tensor]:
    if name in values:
        return values[name]
    if name in {selected.name for selected in tracing.selected}:
        raise OptionError(f"{name!r} did not occur in this run: the rule that it belongs to is off.")
    raise OptionError(f"{name!r} was not kept; name it, or what it is part of, in the call of trace.")


def _rows(value: Tensor, row: int, batch: int) -> Tensor:
    """A value of a batch -> what it would be of its `row` alone."""
    each = len(value) // batch  # more than 1 for windows, and for beams
    return value[row * each : (row + 1) * each]


def _cut(value: Tensor, shape: Sequence[str], lengths: Mapping[str, int]) -> Tensor:
    """Without the padding: every dimension whose letter is in `lengths` cut to it."""
    for dim, letter in enumerate(shape):
        if letter in lengths:
            value = value.narrow(dim, 0, lengths[letter])
    return value


def _alone(value: Tensor, known: Name) -> Tensor:
    """A value of a batch of one, without what is 1 by its name."""
    return value.reshape([size for size, part in zip(value.shape, known.shape, strict=True) if part not in ("B", "1")])


def _of_own_past(weights: Tensor, steps: int) -> Tensor:
    """(heads, K, t·K), of which only the slots of a beam's own past are not zero -> (heads, K, steps)."""
    K = weights.shape[1]
    own = weights.unflatten(2, (-1, K)).sum(dim=-1)  # (heads, K, t)
    return torch.nn.functional.pad(own, (0, steps - own.shape[2]))
