"""Florence2: images and tasks in, answers out. `load` puts everything together."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from florence2.answers.answer import Answer, Box
from florence2.answers.cascade import Cascade
from florence2.answers.confidence import Calibration
from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.checkpoint import checkpoint_folder, load_model
from florence2.checkpoints.checks.belonging import check_image_settings
from florence2.checkpoints.checks.calibration import choose_calibration
from florence2.checkpoints.checks.empty import Prepare
from florence2.checkpoints.checks.loading import Parts, check_loading
from florence2.checkpoints.hub import DEFAULT_MODEL, resolve, resolve_adapter
from florence2.errors import CheckpointError, Florence2Error, OptionError, PromptError, plain, shown
from florence2.fast.install import install
from florence2.generation.options import GenerationOptions
from florence2.inputs.files import read_stream
from florence2.inputs.image import Colour, ImageInput, is_file_object, parse_colour
from florence2.inputs.processor import TaskText
from florence2.model.absent import find_absent
from florence2.model.attention import AttentionKind
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import TraceBlock
from florence2.processor import Processor
from florence2.request import AnyImage as AnyImage
from florence2.request import EncodedImage as EncodedImage
from florence2.request import PreparedImage as PreparedImage
from florence2.request import Request as Request
from florence2.request import check_request as check_request
from florence2.request import check_requests, encode_once, outline_requests
from florence2.runner import Runner
from florence2.stream import Asked, answer_stream, encode_ahead, images_at_once, in_parts
from florence2.tracing.budget import DEFAULT_LIMIT
from florence2.tracing.patches import PatchLike, patched
from florence2.tracing.recording import Tracing, trace
from florence2.tracing.selection import Unknown

Detail = Literal["short", "detailed", "more_detailed"]
_SHARE = 0.2  # of the time, for the answers of a stream: the first come before all slots are filled
_OPENED = 8  # images that a batch opens before it encodes the first, so that a broken one costs nothing
_CAPTIONS = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more_detailed": "<MORE_DETAILED_CAPTION>"}


class Florence2(Runner):
    """One checkpoint, ready to answer. Nothing in it changes, so threads may share it.

    Every method that answers takes generation settings, either as keywords, `f.run("<OD>", image, num_beams=1)`, or
    as `options=f.options(num_beams=1)`; given both, the keywords change the options. `GenerationOptions` lists the
    settings.
    """

    def __init__(
        self, model: Florence2Model, processor: Processor, name: str | None = None, prepare: Prepare | None = None
    ):
        """Join a model and a processor.

        Args:
            model: The model, in eval mode.
            processor: The tokenizer and image settings of the same checkpoint.
            name: What `repr` calls the checkpoint.
            prepare: The function that has shaped the model before it was loaded, which `save` takes into account.

        Raises:
            CheckpointError: The tokenizer's vocabulary and the model's differ, the model has no positions for images of
                the processor's size, or the checkpoint's generation settings are invalid.
        """
        super().__init__(model, processor, prepare)
        self.name, self._absent = name, find_absent(model)

    def __repr__(self) -> str:
        millions = sum(parameter.numel() for parameter in self.model.parameters()) / 1e6
        facts = [
            self.name,
            self._absent and f'parts="{self._absent.parts}"',
            f"{millions:.{0 if millions >= 10 else 1}f}M parameters",
            str(self.model.device),
            str(self.model.dtype).removeprefix("torch."),
        ]
        return f"Florence2({', '.join(fact for fact in facts if fact)})"

    def trace(
        self, *patterns: str, limit: int = DEFAULT_LIMIT, unknown: Unknown = "refuse"
    ) -> AbstractContextManager[Tracing]:
        """Keep the values that `patterns` name, in every run of this object in this thread within the block.

        `with f.trace("decoder.layers.*.cross_attention") as t: f.run(...)`; see `florence2.tracing.recording`.
        """
        return trace(self, *patterns, limit=limit, unknown=unknown)

    def patched(self, patches: Mapping[str, PatchLike], *, unknown: Unknown = "refuse") -> TraceBlock:
        """Change the values that `patches` name, in every run of this object in this thread within the block.

        `with f.patched({"decoder.layers.2.cross_attention.heads": zero_heads([3])}): f.run(...)`; see
        `florence2.tracing.patches`.
        """
        return patched(self, patches, unknown=unknown)

    def run(
        self,
        task: str,
        image: AnyImage,
        text: TaskText = None,
        *,
        box: Sequence[float] | None = None,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Answer one task on one image.

        Args:
            task: A token such as "<OD>", its alias "od", or a free prompt: several words that are
                not a task's name, or a `FreePrompt`.
            image: A path, the bytes of an image file, a Pillow image, an array (see `open_image`), or an
                `EncodedImage`.
            text: The task's input: text, a list of classes, or a box. It may also follow the token in `task`.
            box: The task's input as a box (x1, y1, x2, y2) in pixels of the image: a sequence, an array or a tensor.
            background: The colour that transparent pixels show, such as "white". None is that of `load`, which by
                default drops alpha, as the reference does.
            options: Generation settings; None is the checkpoint's own.
            **settings: Single generation settings, such as `num_beams=1`, `max_new_tokens=64` or `confidence=False`.

        Raises:
            PromptError: The task is unknown, or its input is missing, superfluous or wrong.
            ImageError: The image cannot be read.
            OptionError: A generation setting is unknown or out of range, or `background` is not a colour.
            Florence2Error: The model was loaded without its decoder.
        """
        if text is not None and box is not None:
            raise PromptError(f"Task {task} got two inputs, {shown(text)} and box={shown(box)}; give one.")
        options = self._choose_options(options, settings)
        request = check_request((task, image, text if box is None else box), self.processor.tasks)
        return self._answer([request], self._encode_sources([image], background), options)[0]

    def run_batch(
        self,
        requests: Sequence[Request],
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> list[Answer]:
        """Answer many requests, whose tasks may differ. Every answer has the tokens that `run` gives.

        All requests are checked before anything is computed, and each image is encoded once, when it is first needed.
        An answer that ends makes room for the next; none waits for a longer one.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the checkpoint's own.
            batch_size: How many requests are answered at once, at least 1; fewer where memory would not suffice. By
                default as many as fit into a quarter of the free memory, at most 64.
            **settings: Single generation settings, such as `num_beams=1`.

        Returns:
            The answers in the order of the requests.

        Raises:
            As `run`; an ImageError is raised when the image is first needed.
        """
        options, size = self._choose_options(options, settings), _check_batch_size(batch_size)
        checked = check_requests(requests, self.processor.tasks)
        sources = [request.image for request in checked]
        _check_background(background, sources)
        images = encode_once(sources, partial(self._encode_ahead, background=background, at_once=size))
        answers: list[Answer] = []
        for answer in answer_stream(self, zip(checked, images, strict=True), options, size):
            if isinstance(answer, Florence2Error):
                raise answer
            answers.append(answer)
        return answers

    def stream(
        self,
        requests: "Iterable[Request | Florence2Error]",
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        batch_size: int | None = None,
        **settings: Any,
    ) -> Iterator[Answer | Florence2Error]:
        """Answer requests of any number as `run_batch` does, in their order, with errors in place of answers.

        The next request is taken when there is room for it, so `requests` may be a generator that reads images as it
        goes. Images are not compared: to ask several questions about one, encode it once with `encode_image`.

        Args:
            requests: (task, image) or (task, image, input) each, as in `run`; an error stands for a request that
                could not be made, and comes back in its place.
            background: The colour that transparent pixels show, as in `run`.
            options: Generation settings; None is the checkpoint's own.
            batch_size: How many requests are answered at once, at least 1; fewer where memory would not suffice. By
                default as many as fit into a quarter of the free memory, at most 64.
            **settings: Single generation settings, such as `num_beams=1`.

        Yields:
            For each request its answer, or the PromptError, ImageError or OptionError that kept it from one.

        Raises:
            OptionError: `batch_size` or a generation setting is wrong.
            Florence2Error: The model was loaded without its decoder.
        """
        options, size = self._choose_options(options, settings), _check_batch_size(batch_size)
        if not isinstance(requests, Iterable) or isinstance(requests, str | bytes | Mapping):
            raise PromptError(f"requests is {shown(requests)}; give an iterable of (task, image[, input]).")
        asked = (self._open(each, background) for each in requests)
        return answer_stream(self, asked, options, size, decoding_share=_SHARE)

    def _open(self, request: "Request | Florence2Error", background: Colour | None) -> Asked | Florence2Error:
        """Check a request and encode its image; return the error where that fails."""
        if isinstance(request, Florence2Error):
            return request
        try:
            checked = check_request(request, self.processor.tasks)
            return checked, self._encode_sources([checked.image], background)[0]
        except Florence2Error as error:
            return error

    def caption(
        self, image: AnyImage, detail: Detail = "short", *, options: GenerationOptions | None = None, **settings: Any
    ) -> Answer:
        """Describe the image in a sentence ("short"), a few ("detailed") or a paragraph ("more_detailed").

        `background` is as in `run`; `options` and `settings` are generation settings. Raises as `run`.
        """
        if not isinstance(detail, str) or detail not in _CAPTIONS:
            raise PromptError(f"detail is {shown(detail)}; it must be one of {', '.join(_CAPTIONS)}.")
        return self.run(_CAPTIONS[detail], image, options=options, **settings)

    def detect(
        self,
        image: AnyImage,
        classes: str | Sequence[str] | None = None,
        *,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Find the boxes of everything the model knows, or of the `classes` (open vocabulary).

        `options` and `settings` are generation settings, as in `run`. Raises as `run`, and PromptError for an
        empty `classes`.
        """
        if classes is None:
            return self.run("<OD>", image, options=options, **settings)
        if isinstance(classes, str | list | tuple) and not (classes.strip() if isinstance(classes, str) else classes):
            raise PromptError(
                f"classes is {classes!r}; name at least one class, or leave out classes to find everything."
            )
        return self.run("<OPEN_VOCABULARY_DETECTION>", image, classes, options=options, **settings)

    def ground(
        self, image: AnyImage, caption: str, *, options: GenerationOptions | None = None, **settings: Any
    ) -> Answer:
        """Find the boxes of the phrases of `caption`.

        `options` and `settings` are generation settings, as in `run`. Raises as `run`.
        """
        return self.run("<CAPTION_TO_PHRASE_GROUNDING>", image, caption, options=options, **settings)

    def segment(
        self,
        image: AnyImage,
        text: str | None = None,
        *,
        box: Sequence[float] | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Outline the object that `text` refers to, or the object inside `box` (x1, y1, x2, y2) in pixels.

        `options` and `settings` are generation settings, as in `run`. Raises as `run`, and PromptError unless
        exactly one of `text` and `box` is given.
        """
        if (text is None) == (box is None):
            got = "neither text nor box" if text is None else f"both text={shown(text)} and box={shown(box)}"
            raise PromptError(f"segment got {got}; give a text that refers to the object, or a box around it.")
        if box is None:
            return self.run("<REFERRING_EXPRESSION_SEGMENTATION>", image, text, options=options, **settings)
        return self.run("<REGION_TO_SEGMENTATION>", image, box=box, options=options, **settings)

    def ocr(
        self,
        image: AnyImage,
        *,
        regions: bool = False,
        box: Sequence[float] | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Answer:
        """Read the text in the image: as plain text, as quads with their lines (`regions`), or only inside `box`.

        `box` is (x1, y1, x2, y2) in pixels. `options` and `settings` are generation settings, as in
        `run`. Raises as `run`, and PromptError for `regions` together with `box`.
        """
        if box is None:
            return self.run("<OCR_WITH_REGION>" if regions else "<OCR>", image, options=options, **settings)
        if regions:
            raise PromptError("ocr got regions=True and a box, but no task reads the regions inside a box; give one.")
        return self.run("<REGION_TO_OCR>", image, box=box, options=options, **settings)

    def describe(
        self, image: AnyImage, box: Sequence[float], *, options: GenerationOptions | None = None, **settings: Any
    ) -> Answer:
        """Describe in words the content of `box` (x1, y1, x2, y2) in pixels.

        `options` and `settings` are generation settings, as in `run`. Raises as `run`.
        """
        return self.run("<REGION_TO_DESCRIPTION>", image, box=box, options=options, **settings)

    def cascade(
        self,
        image: AnyImage,
        detail: Detail = "short",
        *,
        background: Colour | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> Cascade:
        """Caption the image, find the caption's phrases in it, and outline each; the image is encoded once.

        A caption that cannot be grounded, because it is too long, and a box with swapped corners, which cannot be
        outlined, leave a gap; `Cascade.missing` says why.

        `background` is as in `run`; `options` and `settings` are generation settings. Raises as `run`.
        """
        encoded = self._encode_sources([image], background)[0]
        caption = self.caption(encoded, detail, options=options, **settings)
        nothing = self.processor.answer("<CAPTION_TO_PHRASE_GROUNDING>", "", image_size=encoded.size)
        phrases = caption.text.strip()
        if not phrases:
            return Cascade.join(caption, nothing, ())
        try:
            grounding = self.ground(encoded, phrases, options=options, **settings)
        except Florence2Error as error:
            return Cascade.join(
                caption, nothing, (), [f"The caption could not be grounded, so it stands alone: {error}"]
            )
        outlines, missing = self._outline(encoded, grounding.boxes, options, settings)
        return Cascade.join(caption, grounding, outlines, missing)

    def _outline(
        self, image: EncodedImage, boxes: Sequence[Box], options: GenerationOptions | None, settings: Mapping[str, Any]
    ) -> tuple[list[Answer], list[str]]:
        """Outline each box; return an answer for each, and a sentence for each gap."""
        requests, missing = outline_requests(image, boxes)
        outlines = [self.processor.answer("<REGION_TO_SEGMENTATION>", "", image_size=image.size) for _ in boxes]
        try:
            answers = self.run_batch(list(requests.values()), options=options, **settings)
        except Florence2Error as error:
            return outlines, [*missing, f"The boxes could not be outlined: {error}"]
        for i, answer in zip(requests, answers, strict=True):
            outlines[i] = answer
        return outlines, missing

    def _choose_options(self, options: GenerationOptions | None, settings: Mapping[str, Any]) -> GenerationOptions:
        """Return the settings of one call, which only a complete model can follow."""
        if self._absent is not None:
            raise self._absent.error()
        if options is None:
            options = self._options
        if not isinstance(options, GenerationOptions):
            raise OptionError(
                f"options is {shown(options)}, not a GenerationOptions; write f.options(num_beams=1), or give the "
                "settings as keywords, num_beams=1."
            )
        return options.changed(**settings) if settings else options

    def _encode_sources(self, sources: Sequence[AnyImage], background: Colour | None = None) -> list[EncodedImage]:
        """Encode the images that are not encoded yet; return all in order."""
        _check_background(background, sources)
        new = [self.prepare_image(image, background) for image in sources if not isinstance(image, EncodedImage)]
        encoded = iter(self.encode_images(new))
        return [image if isinstance(image, EncodedImage) else next(encoded) for image in sources]

    def _encode_ahead(
        self, sources: Iterable[ImageInput], background: Colour | None, at_once: int | None
    ) -> Iterator[EncodedImage]:
        """Encode images in their order; where several threads read, they read the next ones meanwhile."""
        prepare = partial(self.prepare_image, background=background)
        if self.choose_pixels().threads == 1:  # a thread would take time from the model, which uses all cores
            opened = max(images_at_once(self, at_once), min(at_once or _OPENED, _OPENED))
            for part in in_parts(sources, opened):
                yield from self.encode_images([prepare(source) for source in part])
            return
        # a file object may belong to this thread, so the reading threads get its bytes
        sources = (read_stream(source) if is_file_object(source) else source for source in sources)
        for _, image in encode_ahead(self, sources, prepare, at_once):
            if isinstance(image, Florence2Error):
                raise image
            yield image


def _check_background(background: Colour | None, images: Sequence[AnyImage]) -> None:
    if background is not None and any(isinstance(image, EncodedImage) for image in images):
        raise OptionError("background has no effect on an EncodedImage; give it to encode_image.")


def _check_batch_size(size: int | None) -> int | None:
    size = plain(size)
    if size is not None and (type(size) is not int or size < 1):
        raise OptionError(f"batch_size is {shown(size)}; it must be a whole number of at least 1.")
    return size


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    attention: AttentionKind = "sdpa",
    parts: Parts = "all",
    allow_pickle: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    changes: Mapping[str, Any] | None = None,
    prepare: Prepare | None = None,
    background: Colour | None = None,
    calibration: str | os.PathLike[str] | Calibration | None = None,
    report: Callable[[str], None] | None = None,
) -> Florence2:
    """Load a checkpoint into a Florence2 that answers.

    A path never touches the network; a name is fetched once (see `florence2.checkpoints.hub.download`).

    Args:
        name: A short name ("base", "large", "base-ft", "large-ft", or "nano", which comes with the package), a Hub id
            OWNER/NAME, a folder, a weight file, or an index of shards.
        device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device.
        dtype: "auto" (float32 on a CPU; elsewhere float16, in which the published weights are stored), "float32",
            "float16" or "bfloat16".
        revision: A branch, tag or commit on the Hub; None is the main branch.
        local_files_only: Fetch nothing.
        attention: "sdpa" (torch's kernel) or "eager" (written out).
        parts: The parts to read and hold: "all", "encoder" (no decoder: for `model.encode`), or "vision" (vision tower
            and projection: for `encode_image`).
        allow_pickle: Accept weights that exist only as a `.bin`.
        adapter: A folder or Hub id of a LoRA adapter, which is merged into the weights (see `merge_adapter`). Its
            `tasks.json` adds to the model's tasks.
        changes: New values of the checkpoint's settings, such as `{"vision.window_size": 8,
            "text.activation_function": "silu", "generation.num_beams": 1}` (see `change_config`). They are checked
            like those of the file, and `save` writes them.
        prepare: A function that changes the empty model before the weights are read: it adds adapters, replaces
            modules, prunes heads, registers hooks. The file must hold exactly the tensors that the model then has;
            `save` writes such files (see `florence2.checkpoints.checks.empty.Prepare`).
        background: The colour that transparent pixels of images show, such as "white"; it is not saved. None drops
            alpha, as the reference does, and shows the colours that transparent pixels hide.
        calibration: A file of `florence2 calibrate`, or a `Calibration`, in place of `confidence.json` next to the
            weights, which is then not read. The latter is not used with `prepare`, and with `changes` of more than
            generation: another model's confidences are raw.
        report: Called with a line about the files to fetch, before they are fetched.

    Raises:
        OptionError: A setting has a wrong value; no file was read.
        HubError: The name means nothing, or fetching failed.
        CheckpointError, ConfigError: The files are missing, damaged, or do not fit each other; everything that is
            wrong is listed.
    """
    chosen_device, chosen_dtype = check_loading(device, dtype, attention, parts)
    if background is not None:
        background = parse_colour(background)
    if adapter is not None and parts != "all":
        raise OptionError(f'An adapter needs the whole model, but parts is "{parts}"; load with parts="all".')
    path = resolve(name, revision, local_files_only, allow_pickle, report)
    adapter_folder = None if adapter is None else resolve_adapter(adapter, local_files_only)
    problems: list[Florence2Error] = []
    try:
        if not isinstance(calibration, Calibration):
            file = None if calibration is None else Path(calibration)
            calibration = choose_calibration(checkpoint_folder(path), adapter_folder, file, changes, prepare)
        processor = Processor.from_folder(checkpoint_folder(path), adapter_folder, calibration)
        processor = processor.changed(background=background)
    except Florence2Error as error:
        problems.append(error)
    try:
        model = load_model(
            path,
            device=chosen_device,
            dtype=chosen_dtype,
            attention=attention,
            parts=parts,
            allow_pickle=allow_pickle,
            changes=changes,
            prepare=prepare,
        )
        if adapter_folder is not None:
            merge_adapter(model, adapter_folder)
    except Florence2Error as error:
        problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointError("\n".join(map(str, problems)))
    check_image_settings(model.config, processor.image_config)
    # attention="eager" selects the plain model, so nothing is swapped in
    return Florence2(model if attention == "eager" else install(model), processor, os.fspath(name), prepare)
