"""What a trace holds of one picture, and of one request that was answered."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from florence2.answers.answer import Answer
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.model.images import EncodedImage
from florence2.tracing.beams import BeamStep, read_beams, rows_of
from florence2.tracing.names import Name, pooled_spans

if TYPE_CHECKING:
    from florence2.tracing.recording import Tracing


class TracedPicture:
    """What a trace kept of one picture on its way through the vision tower and the projection."""

    def __init__(
        self,
        tracing: "Tracing",
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
        return [_rows(_kept(self.values, name, self.tracing)[0], self.row, self.pixel_shape[0])]


class Run:
    """One request, answered: what was asked, what was computed, what was answered.

    Values are those of this request alone: what its batch holds beside it, other requests, padding of its prompt,
    steps after its end, is left out, so they are what they are when it is asked alone.
    """

    def __init__(
        self,
        tracing: "Tracing",
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
        steps = list(self._steps(known))
        return torch.stack(steps) if known.when == "step" else steps[0]

    def _steps(self, known: Name) -> Iterator[Tensor]:
        for value in self.batched(known.name):
            alone = _alone(value, known)
            yield _of_own_past(alone, len(self.beams)) if known.shape[-1] == "t·K" else alone

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
        known = self.tracing.known_name(name)
        letters = known.own_shape
        if "K" not in letters:
            raise OptionError(f"{name!r} is not computed for every token of the answer; ask for it as run[name].")
        if known.searched:
            raise OptionError(f"{name!r} is part of the search, which `beams` gives.")
        rows, beam = self.rows(alternative), letters.index("K") - 1
        found = torch.stack([step.select(beam, row) for step, row in zip(self._steps(known), rows, strict=False)])
        return found[..., : len(rows)] if letters[-1] == "steps" else found


def _kept(values: Mapping[str, Sequence[Tensor]], name: str, tracing: "Tracing") -> Sequence[Tensor]:
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
    own = weights.reshape(*weights.shape[:2], -1, K).sum(dim=-1)  # (heads, K, t)
    return torch.nn.functional.pad(own, (0, steps - own.shape[2]))
