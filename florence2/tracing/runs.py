"""The parts of a trace: one image that was encoded, and one request that was answered."""

from collections.abc import Mapping, Sequence
from functools import cached_property

import torch
from torch import Tensor

from florence2.answers.answer import Answer
from florence2.asking.requests import EncodedImage
from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.tracing.beams import BeamStep, answer_rows, read_beams
from florence2.tracing.names import Name, When, pooled_spans
from florence2.tracing.selection import CallSizes, Selection, name_value


class TracedImage:
    """The values that a trace kept of one image on its way through the vision tower and the projection."""

    def __init__(
        self,
        selection: Selection,
        values: Mapping[str, Sequence[Tensor]],
        row: int,
        encoded: EncodedImage,
        pixel_shape: Sequence[int],
    ):
        self.selection, self.values, self.row = selection, values, row
        self.encoded = encoded
        """The result, which the pipeline passes on to the encoder."""
        self.pixel_shape = tuple(pixel_shape)
        """(B, 3, H, W) of the batch that it was in."""

    @property
    def names(self) -> list[str]:
        """The names that were kept."""
        return list(self.values)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the last stage, and so of the image tokens."""
        return self.selection.config.vision.grid_size(self.pixel_shape[2], self.pixel_shape[3])

    def __getitem__(self, name: str) -> Tensor:
        """Return one value, in the shape `own_shape` of its name: that of this image without the rest of its batch."""
        known = self.find(name)
        return _alone(self.batched(name)[0], known)

    def batched(self, name: str) -> list[Tensor]:
        """Return the value as it was recorded, for a batch of this image alone."""
        value = _kept(self.values, name, self.selection)[0]
        return [_rows(value, self.find(name), self.row, self.pixel_shape[0])]

    def find(self, name: str) -> Name:
        """Return the entry of a name, of the table or of a value that was recorded under it."""
        if name in self.selection.known or name not in self.values:
            return self.selection.find(name)
        return name_value(name, self.values[name][0], "image", CallSizes(self.pixel_shape[0]))


class Run:
    """One answered request: what was asked, computed and answered.

    Values are those of this request alone. Everything else that its batch held (other requests, the padding of its
    prompt, steps after its end) is left out, so they equal the values of the same request asked on its own.
    """

    def __init__(
        self,
        selection: Selection,
        values: Mapping[str, Sequence[Tensor]],
        row: int,
        answer: Answer,
        traced_images: Sequence[TracedImage],
        images: Sequence[EncodedImage],
        prompts: Sequence[list[int]],
        options: GenerationOptions,
    ):
        self.selection, self.values, self.row, self.batch = selection, values, row, len(prompts)
        self.answer, self.options = answer, options
        self.encoded = images[row]
        """The image as the encoder received it."""
        self.prompt_ids = tuple(prompts[row])
        self.image_size = self.encoded.size
        """(width, height) of the upright image in pixels."""
        self.image_tokens = self.encoded.features.shape[1]
        self._sizes = CallSizes(len(prompts), options.width, self.image_tokens + max(map(len, prompts)))
        self._traced_images = traced_images

    @property
    def names(self) -> list[str]:
        """The names that were kept, including those of its image. Those of the search are in `beams`."""
        image = self._find_image()
        return [*(image.names if image else ()), *(name for name in self.values if not name.startswith("search."))]

    @property
    def image(self) -> TracedImage:
        """The values of its image. Raises OptionError when the image was encoded outside of the block."""
        image = self._find_image()
        if image is None:
            raise OptionError("This run's image was encoded outside of the trace; encode it within the block.")
        return image

    def find(self, name: str) -> Name:
        """Return the entry of a name, of the table or of a value that was recorded under it."""
        image = self._find_image()
        if name not in self.selection.known and name in self.values:
            return name_value(name, self.values[name][0], self._when(name), self._sizes)
        if name not in self.selection.known and image and name in image.values:
            return image.find(name)
        return self.selection.find(name)

    def _when(self, name: str) -> When:
        """Return when a value that the table does not have was recorded."""
        times, steps, encoding = len(self.values[name]), len(self.values["search.done"]), name.startswith("encoder.")
        if times == steps and not encoding:
            return "step"
        if times > 1:
            raise OptionError(
                f"{name!r} was recorded {times} times in a run of {steps} steps; a name must be recorded once, or once "
                "a step."
            )
        return "prompt" if encoding else "answer"

    def _find_image(self) -> TracedImage | None:
        return next((image for image in self._traced_images if image.encoded is self.encoded), None)

    @property
    def image_grid(self) -> tuple[int, int]:
        """Rows and columns of the image tokens in `grid_span`."""
        image, vision = self._find_image(), self.selection.config.vision
        height, width = self.selection.usual_size if image is None else image.pixel_shape[2:]
        grid = vision.grid_size(height, width)
        if max(span.stop for span in pooled_spans(vision, grid).values()) != self.image_tokens:
            raise OptionError(
                f"The image has {self.image_tokens} image tokens, which do not fit {height} x {width} pixels, so "
                "its grid is unknown; encode it within the block."
            )
        return grid

    @property
    def image_spans(self) -> dict[str, slice]:
        """The part of the memory that each pooling fills: as published, the mean over the grid at 0, then the grid."""
        return pooled_spans(self.selection.config.vision, self.image_grid)

    @property
    def grid_span(self) -> slice:
        """The part of the memory that holds one token for each of the grid's h·w places, row by row."""
        spans = self.image_spans
        return next(spans[source] for source in spans if source != "spatial_avg_pool")

    @property
    def prompt_span(self) -> slice:
        """The part of the memory that holds the prompt."""
        return slice(self.image_tokens, self.image_tokens + len(self.prompt_ids))

    @cached_property
    def beams(self) -> tuple[BeamStep, ...]:
        """The steps of the search, until this request was settled."""
        return read_beams(self.values, self.row, self.options, self.selection.config.text)

    def answer_ids(self, alternative: int = 0) -> tuple[int, ...]:
        """Return the T generated ids, without the start id.

        Args:
            alternative: 0 for the answer; above 0 for the hypotheses in `answer.alternatives`.

        Returns:
            The ids, the end included.

        Raises:
            OptionError: The run has no such alternative.
        """
        answers = (self.answer, *self.answer.alternatives)
        if not 0 <= alternative < len(answers):
            raise OptionError(f"alternative is {alternative}; those of this run are 0 to {len(answers) - 1}.")
        return tuple(answers[alternative].token_ids[1:])

    def rows(self, alternative: int = 0) -> tuple[int, ...]:
        """Return the beam that wrote each of `answer_ids`: token n was computed in row `rows[n]` of step n."""
        rows = answer_rows(self.beams, self.answer_ids(alternative))
        assert rows is not None, "some beam wrote every answer"
        return rows

    def __getitem__(self, name: str) -> Tensor:
        """Return one value, in the shape `own_shape` of its name: steps first, if it is computed at every step.

        Self-attention weights of the decoder cover each beam's own past: (steps, heads, K, steps), with zeros at steps
        that are still to come. Raises OptionError for a name that does not exist or was not kept.
        """
        known = self.find(name)
        if known.when == "image":
            return self.image[name]
        if known.searched:
            raise OptionError(f"{name!r} is part of the search; read it from `beams`.")
        steps = self._steps(known)
        return torch.stack(steps) if known.when == "step" else steps[0]

    def _steps(self, known: Name) -> list[Tensor]:
        values = self.batched(known.name)
        if not known.grows and len({value.shape for value in values}) > 1:
            raise OptionError(f"The shape of {known.name!r} changes from step to step; read run.batched(...), a list.")
        alone = [_alone(value, known) for value in values]
        return [_of_own_past(value, len(self.beams)) for value in alone] if known.grows else alone

    def batched(self, name: str) -> list[Tensor]:
        """Return the values as they were recorded, one for each step, for a batch of this request alone."""
        values, known = _kept(self.values, name, self.selection), self.find(name)
        last = len(self.beams) if known.when == "step" else 1
        return [_cut(_rows(value, known, self.row, self.batch), known, self._lengths()) for value in values[:last]]

    def _lengths(self) -> dict[str, int]:
        return {"S": self.prompt_span.stop, "P": len(self.prompt_ids)}

    def along_answer(self, name: str, alternative: int = 0) -> Tensor:
        """Return a value of every step in the beam that wrote the answer.

        Args:
            name: A name that is recorded at every step.
            alternative: As in `answer_ids`.

        Returns:
            (T, ...), the shape of `run[name]` without K. Entry n is of the step that computed `answer_ids()[n]`.

        Raises:
            OptionError: The name does not exist, was not kept, or is not computed for every token.
        """
        known = self.find(name)
        letters = known.own_shape
        if "K" not in letters:
            raise OptionError(f"{name!r} is not computed for every token of the answer; read it as run[name].")
        if known.searched:
            raise OptionError(f"{name!r} is part of the search; read it from `beams`.")
        rows, beam = self.rows(alternative), letters.index("K") - 1
        values = torch.stack([step.select(beam, row) for step, row in zip(self._steps(known), rows, strict=False)])
        return values[..., : len(rows)] if known.grows else values


def _kept(values: Mapping[str, Sequence[Tensor]], name: str, selection: Selection) -> Sequence[Tensor]:
    if name in values:
        return values[name]
    if name in {selected.name for selected in selection.names}:
        raise OptionError(
            f"{name!r} was not recorded in this run: either the rule that it belongs to is off, or its module was "
            "replaced by one that does not record it."
        )
    raise OptionError(f"{name!r} was not kept; name it, or a module above it, in the call of trace.")


def _rows(value: Tensor, known: Name, row: int, batch: int) -> Tensor:
    """Return the part of a batch's value that belongs to its `row`; all of a value that does not count the batch."""
    if not known.shape or not known.shape[0].startswith("B"):
        return value
    each = len(value) // batch  # more than 1 for windows and beams
    return value[row * each : (row + 1) * each]


def _cut(value: Tensor, known: Name, lengths: Mapping[str, int]) -> Tensor:
    """Remove the padding: cut every dimension whose letter is in `lengths` to that length."""
    for dim, letter in enumerate(known.shape):
        if letter in lengths:
            value = value.narrow(dim, 0, lengths[letter])
    return value


def _alone(value: Tensor, known: Name) -> Tensor:
    """Remove the dimensions of size 1 from the value of a batch of one."""
    single = known.dims("B", "1")
    return value.reshape([size for dim, size in enumerate(value.shape) if dim not in single])


def _of_own_past(weights: Tensor, steps: int) -> Tensor:
    """Turn weights (heads, K, t·K) into (heads, K, steps): in t·K only the slots of a beam's own past are not zero."""
    K = weights.shape[1]
    own = weights.reshape(*weights.shape[:2], -1, K).sum(dim=-1)  # (heads, K, t)
    return torch.nn.functional.pad(own, (0, steps - own.shape[2]))
