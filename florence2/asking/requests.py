"""Images in each of their forms, the questions about them, checked once, and their encoding, once for each image."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from florence2.answers.answer import Answer, Box
from florence2.errors import Florence2Error, OptionError, PromptError, plain, shown
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import bins_to_tokens, pixels_to_bins
from florence2.inputs.image import Colour, ImageInput
from florence2.inputs.processor import TaskText, input_to_text, read_input
from florence2.inputs.tasks import TASKS, Task, build_sentence, check_prompt, find_task


@dataclass(frozen=True, eq=False)
class PreparedImage:
    """An image that was read, which any thread can do while the model computes.

    `pixels` (h, w, 3) in uint8: those of the image or, where the host resizes images, of the model's input. `size` is
    (width, height) of the upright image in pixels. `source` is what the image was read from, unless that was the bytes
    of a file.
    """

    pixels: np.ndarray = field(repr=False)
    size: tuple[int, int]
    source: "ImageInput | None" = field(default=None, repr=False)


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """An image after the vision tower, the expensive part; every task on it can start from here.

    `features` (1, N, D) are a tensor on the model's device, or an array in a runtime without torch; `size` is (width,
    height) of the upright image in pixels. `source` is what the image was read from, unless that was the bytes of a
    file.
    """

    features: Any
    size: tuple[int, int]
    source: "ImageInput | None" = field(default=None, repr=False)


AnyImage: TypeAlias = "ImageInput | EncodedImage"
"""An image in any form that `open_image` reads, or one that was encoded before."""
Request: TypeAlias = "tuple[str, AnyImage] | tuple[str, AnyImage, TaskText]"
"""(task, image) or (task, image, input)."""
Arrived: TypeAlias = Callable[[int, Answer | Florence2Error], None]
"""A function that is called with a request's number from 0, and its answer or error as soon as that is known."""


@dataclass(frozen=True)
class CheckedRequest:
    """A request whose task exists and takes its input. A free prompt is a task of its own here."""

    task: Task
    image: AnyImage
    text: str = ""
    box: Sequence[float] | None = None
    """In pixels; its location tokens take the place of `text` once the image's size is known."""

    def sentence(self, image_size: tuple[int, int]) -> str:
        """Return the sentence that the model reads. Raises PromptError for a box outside the image."""
        region = None if self.box is None else input_to_text(self.box, image_size)
        return build_sentence(self.task, self.text if region is None else region)


def check_request(request: Request, tasks: Mapping[str, Task] = TASKS) -> CheckedRequest:
    """Check everything that can be wrong before the image is opened, with the model's `tasks`. Raises PromptError."""
    if not isinstance(request, tuple) or len(request) not in (2, 3):
        raise PromptError(f"A request must be (task, image) or (task, image, input), not {shown(request)}.")
    prompt, image, given = request if len(request) == 3 else (*request, None)
    task_input = read_input(given)
    if isinstance(task_input, tuple):
        return CheckedRequest(_region_task(prompt, task_input, tasks), image, box=task_input)
    task, text = check_prompt(prompt, task_input, tasks)
    return CheckedRequest(task or Task(prompt, "{input}", takes="text"), image, text)


def check_requests(requests: Iterable[Request], tasks: Mapping[str, Task] = TASKS) -> list[CheckedRequest]:
    """Check every request as `check_request` does. Raises PromptError as it does, and for a lone value."""
    if not isinstance(requests, Iterable) or isinstance(requests, str | bytes | Mapping | Set):
        raise PromptError(f"requests is {shown(requests)}; give a list of (task, image) or (task, image, input).")
    return [check_request(request, tasks) for request in requests]


def choose_input(task: str, text: TaskText, box: Sequence[float] | None) -> TaskText:
    """Return the one input of a request. Raises PromptError for two."""
    if text is not None and box is not None:
        raise PromptError(f"Task {task} got two inputs, {shown(text)} and box={shown(box)}; give one.")
    return text if box is None else box


def choose_options(
    own: GenerationOptions, options: GenerationOptions | None, settings: Mapping[str, Any]
) -> GenerationOptions:
    """Return the settings of one call: the model's `own` or `options`, with `settings` changed.

    Raises OptionError for wrong ones.
    """
    options = own if options is None else options
    if not isinstance(options, GenerationOptions):
        raise OptionError(
            f"options is {shown(options)}, not a GenerationOptions; write f.options(num_beams=1), or give the "
            "settings as keywords, num_beams=1."
        )
    return options.changed(**settings) if settings else options


def check_stream(requests: Any) -> None:
    """Raise PromptError for anything but an iterable of requests."""
    if not isinstance(requests, Iterable) or isinstance(requests, str | bytes | Mapping):
        raise PromptError(f"requests is {shown(requests)}; give an iterable of (task, image[, input]).")


def check_features(images: Sequence[EncodedImage], width: int) -> None:
    """Raise PromptError for encoded images that do not have the same shape, (1, N, `width`)."""
    for image in images:
        if len(getattr(image.features, "shape", ())) != 3 or image.features.shape[0] != 1:
            raise PromptError(
                f"An EncodedImage holds features of the shape {getattr(image.features, 'shape', None)}, not (1, N, "
                f"{width}); make it with encode_image."
            )
    shapes = {tuple(image.features.shape[1:]) for image in images}
    if len(shapes) > 1 or max(shapes)[-1] != width:
        raise PromptError(
            f"Encoded images of the shapes {sorted(shapes)} come from different models; encode them again."
        )


def kept_source(image: ImageInput) -> "ImageInput | None":
    """Return what an answer may show itself on later; bytes and consumed files are not worth keeping."""
    kept = isinstance(image, str | os.PathLike | Image.Image) or hasattr(image, "__array__")
    return image if kept else None


def check_background(background: Colour | None, images: Sequence[AnyImage]) -> None:
    """Raise OptionError for a background that comes too late: an image is already encoded."""
    if background is not None and any(isinstance(image, EncodedImage) for image in images):
        raise OptionError("background has no effect on an EncodedImage; give it to encode_image.")


def check_batch_size(size: int | None) -> int | None:
    """Return how many requests are answered at once; None leaves it open. Raises OptionError for anything else."""
    size = plain(size)
    if size is not None and (type(size) is not int or size < 1):
        raise OptionError(f"batch_size is {shown(size)}; it must be a whole number of at least 1.")
    return size


def outline_requests(image: EncodedImage, boxes: Sequence[Box]) -> tuple[dict[int, Request], list[str]]:
    """Return a request to outline each box, by the box's number, and a sentence for each box that cannot be a region.

    The model writes corners in any order, but a region is left, top, right, bottom.
    """
    requests: dict[int, Request] = {}
    problems = []
    for i, box in enumerate(boxes):
        x1, y1, x2, y2 = bins = pixels_to_bins(box.xyxy, image.size)
        if x1 <= x2 and y1 <= y2:
            requests[i] = ("<REGION_TO_SEGMENTATION>", image, bins_to_tokens(bins))
        else:
            problems.append(f"The box of {shown(box.label)} has swapped corners, so it was not outlined.")
    return requests, problems


def _region_task(prompt: str, box: tuple[float, ...], tasks: Mapping[str, Task]) -> Task:
    """Return the task of a request with a box, which must take one."""
    task = find_task(prompt, tasks) if isinstance(prompt, str) else None
    if task is None:
        check_prompt(prompt, tasks=tasks)
        raise PromptError(f"A prompt without a task token takes no box, but got {box}; leave it out.")
    if task.takes not in ("region", "anything"):
        raise PromptError(f"Task {task.token} takes no box, but got {box}; leave it out.")
    if prompt not in (task.token, task.alias):
        raise PromptError(
            f"Task {task.token} got its input twice: in the prompt {shown(prompt)} and as the box {box}; give one."
        )
    return task


def encode_once(
    images: Sequence[AnyImage], encode: Callable[[Iterable[ImageInput]], Iterator[EncodedImage]]
) -> Iterator[EncodedImage]:
    """Yield the encoded image of each request; each is taken from `encode` when it is first needed.

    `encode` is called once, with every image that is not encoded yet. A result is kept until its last use.
    """
    keys = [_image_key(image) for image in images]
    new = {key: image for key, image in zip(keys, images, strict=True) if not isinstance(image, EncodedImage)}
    coming, uses_left = encode(new.values()), Counter(keys)
    encoded: dict[str | int, EncodedImage] = {}
    for key, image in zip(keys, images, strict=True):
        if isinstance(image, EncodedImage):
            yield image
            continue
        if key not in encoded:
            encoded[key] = next(coming)
        uses_left[key] -= 1
        yield encoded[key] if uses_left[key] else encoded.pop(key)


def _image_key(image: AnyImage) -> str | int:
    """Return the key under which an image occurs again: its path, or its identity as an object."""
    return str(image) if isinstance(image, str | os.PathLike) else id(image)
