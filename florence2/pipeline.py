"""Florence2: pictures and tasks in, answers out. `load` puts everything together."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch

from florence2.answers.answer import Answer
from florence2.answers.cascade import Cascade
from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.checkpoint import checkpoint_folder, load_model
from florence2.checkpoints.hub import DEFAULT_MODEL, resolve, resolve_adapter
from florence2.devices import choose_device, choose_dtype
from florence2.errors import CheckpointError, Florence2Error, OptionError, PromptError
from florence2.generation.budget import generation_bytes, how_many_fit
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.generation.search import Generation
from florence2.inputs.coordinates import bins_to_tokens, pixels_to_bins
from florence2.inputs.image import ImageInput, image_to_array, open_image
from florence2.inputs.processor import TaskText, input_to_text
from florence2.inputs.tasks import check_prompt, find_task
from florence2.model.attention import AttentionKind
from florence2.model.config import Florence2Config
from florence2.model.florence2 import Florence2Model
from florence2.model.images import EncodedImage as EncodedImage
from florence2.model.images import PreparedImage as PreparedImage
from florence2.model.trace import Trace, TraceBlock, note, start_trace
from florence2.processor import Processor
from florence2.tracing.budget import DEFAULT_LIMIT
from florence2.tracing.patches import PatchLike, patched
from florence2.tracing.recording import Tracing, trace

Detail = Literal["short", "detailed", "more_detailed"]
_CAPTIONS = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more_detailed": "<MORE_DETAILED_CAPTION>"}


Picture: TypeAlias = "ImageInput | EncodedImage"
Request: TypeAlias = "tuple[str, Picture] | tuple[str, Picture, TaskText]"


class Florence2:
    """One checkpoint, ready to answer. Holds nothing that changes, so threads may share it."""

    def __init__(self, model: Florence2Model, processor: Processor):
        """Join the two. Raises CheckpointError when they cannot be of one checkpoint."""
        _check_vocabulary(model.config, processor.tokenizer.vocab_size)
        self.model, self.processor = model, processor
        try:
            self._options = GenerationOptions.from_settings(model.config.generation)
        except OptionError as error:
            raise CheckpointError(f"The checkpoint's own generation settings cannot be used: {error}") from None

    def options(self, **changes: Any) -> GenerationOptions:
        """The checkpoint's own generation settings, with some changed. Raises OptionError for what does not exist."""
        return self._options.changed(**changes)

    def encode_image(self, image: ImageInput) -> EncodedImage:
        """Run the vision tower on a picture (see `open_image`), once for all tasks to come."""
        return self.encode_images([self.prepare_image(image)])[0]

    def prepare_image(self, image: ImageInput) -> PreparedImage:
        """Read and resize a picture (see `open_image`) for `encode_images`."""
        opened = open_image(image)
        return PreparedImage(torch.from_numpy(image_to_array(opened, self.processor.image_config)), opened.size)

    def encode_images(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """Run the vision tower on several pictures."""
        # A batch saves time where launching work is what costs; on a CPU it only costs memory.
        at_once = 1 if self.model.device.type == "cpu" else max(1, len(images))
        encoded = []
        for start in range(0, len(images), at_once):
            encoded += self._encode_together(images[start : start + at_once])
        return encoded

    def trace(self, *patterns: str, limit: int = DEFAULT_LIMIT) -> AbstractContextManager[Tracing]:
        """Within the block, keep what `patterns` name in every run of this object in this thread, and every beam.

        `with f.trace("decoder.layers.*.cross_attention") as t: f.run(...)`; see `florence2.tracing.recording`.
        """
        return trace(self, *patterns, limit=limit)

    def patched(self, patches: Mapping[str, PatchLike]) -> TraceBlock:
        """Within the block, change what `patches` name in every run of this object in this thread.

        `with f.patched({"decoder.layers.2.cross_attention.heads": zero_heads([3])}): f.run(...)`; see
        `florence2.tracing.patches`.
        """
        return patched(self, patches)

    def run(
        self,
        task: str,
        image: Picture,
        text: TaskText = None,
        *,
        box: Sequence[float] | None = None,
        options: GenerationOptions | None = None,
    ) -> Answer:
        """Answer one task on one picture.

        `task` is a token such as "<OD>", its alias "od", or a free prompt; `text` its input, which may also follow
        the token in one string: text, a list of classes, or a box (x1, y1, x2, y2) in pixels, for which there is also
        `box`. Raises PromptError for a task or input that does not exist or fit, ImageError for an unusable picture.
        """
        if text is not None and box is not None:
            raise PromptError(f"Task {task} got two inputs, {text!r} and box={box!r}; give one.")
        return self.run_batch([(task, image, text if box is None else box)], options=options)[0]

    def run_batch(
        self, requests: Sequence[Request], *, options: GenerationOptions | None = None, batch_size: int = 8
    ) -> list[Answer]:
        """Answer many requests, (task, picture) or (task, picture, input) each; tasks may be mixed.

        Every answer has the tokens that it has alone. `batch_size` is how many are computed at once, fewer where memory
        would not suffice; a picture that occurs several times is encoded once. Raises like `run`: for any bad prompt
        before anything is computed, for a bad picture when its turn comes.
        """
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size}; it must be at least 1.")
        options = options or self._options
        for request in requests:
            check_request(request)
        encoder = _EncodeOnce(self, [request[1] for request in requests])
        answers: list[Answer] = []
        for start in range(0, len(requests), batch_size):
            part = requests[start : start + batch_size]
            answers += self._answer(part, encoder.take([request[1] for request in part]), options)
        return answers

    def caption(self, image: Picture, detail: Detail = "short", *, options: GenerationOptions | None = None) -> Answer:
        """Describe the picture in a sentence ("short"), in a few ("detailed"), or in a paragraph ("more_detailed")."""
        if detail not in _CAPTIONS:
            raise PromptError(f"detail is {detail!r}; it must be one of {', '.join(_CAPTIONS)}.")
        return self.run(_CAPTIONS[detail], image, options=options)

    def detect(
        self,
        image: Picture,
        classes: str | Sequence[str] | None = None,
        *,
        options: GenerationOptions | None = None,
    ) -> Answer:
        """Boxes of everything the model knows, or of the `classes` named (open vocabulary)."""
        task = "<OD>" if classes is None else "<OPEN_VOCABULARY_DETECTION>"
        return self.run(task, image, classes, options=options)

    def ground(self, image: Picture, caption: str, *, options: GenerationOptions | None = None) -> Answer:
        """Boxes of the phrases of `caption`."""
        return self.run("<CAPTION_TO_PHRASE_GROUNDING>", image, caption, options=options)

    def segment(
        self,
        image: Picture,
        text: str | None = None,
        *,
        box: Sequence[float] | None = None,
        options: GenerationOptions | None = None,
    ) -> Answer:
        """The outline of what `text` refers to, or of what is in `box` (pixels)."""
        task = "<REFERRING_EXPRESSION_SEGMENTATION>" if box is None else "<REGION_TO_SEGMENTATION>"
        return self.run(task, image, text, box=box, options=options)

    def ocr(
        self,
        image: Picture,
        *,
        regions: bool = False,
        box: Sequence[float] | None = None,
        options: GenerationOptions | None = None,
    ) -> Answer:
        """The text in the picture, as quads with their lines when `regions` is set, or only that inside `box`."""
        task = "<REGION_TO_OCR>" if box is not None else "<OCR_WITH_REGION>" if regions else "<OCR>"
        return self.run(task, image, box=box, options=options)

    def describe(self, image: Picture, box: Sequence[float], *, options: GenerationOptions | None = None) -> Answer:
        """What is in `box` (pixels), in words."""
        return self.run("<REGION_TO_DESCRIPTION>", image, box=box, options=options)

    def cascade(self, image: Picture, detail: Detail = "short", *, options: GenerationOptions | None = None) -> Cascade:
        """Caption the picture, find the caption's phrases in it, and outline each: one encoding, many answers."""
        encoded = image if isinstance(image, EncodedImage) else self.encode_image(image)
        caption = self.caption(encoded, detail, options=options)
        phrases = caption.text.strip()
        if not phrases:
            nothing = self.processor.answer("<CAPTION_TO_PHRASE_GROUNDING>", "", image_size=encoded.size)
            return Cascade.join(caption, nothing, ())
        grounding = self.ground(encoded, phrases, options=options)
        regions = [bins_to_tokens(pixels_to_bins(box.xyxy, encoded.size)) for box in grounding.boxes]
        requests: list[Request] = [("<REGION_TO_SEGMENTATION>", encoded, region) for region in regions]
        return Cascade.join(caption, grounding, self.run_batch(requests, options=options))

    def _encode_together(self, images: Sequence[PreparedImage]) -> list[EncodedImage]:
        """One batch."""
        pixel_values, trace = torch.cat([image.pixel_values for image in images]), start_trace(self)
        note(trace, "encodes", shape=pixel_values.shape)
        with torch.no_grad():
            features = self.model.encode_image(pixel_values, trace)
        encoded = [EncodedImage(row[None], image.size) for row, image in zip(features, images, strict=True)]
        note(trace, "encoded", pictures=encoded)
        return encoded

    def _answer(
        self, requests: Sequence[Request], pictures: Sequence[EncodedImage], options: GenerationOptions
    ) -> list[Answer]:
        """One batch."""
        inputs = [request[2] if len(request) == 3 else None for request in requests]
        prompts = [
            self.processor.prompt(request[0], given, picture.size)
            for request, given, picture in zip(requests, inputs, pictures, strict=True)
        ]
        length = pictures[0].features.shape[1] + max(map(len, prompts))
        each = generation_bytes(self.model.config, options, length, self.model.dtype)
        at_once = how_many_fit(each, self.model.device)
        answers: list[Answer] = []
        for start in range(0, len(requests), at_once):  # a batch that does not fit is split
            part, trace = slice(start, start + at_once), start_trace(self)
            note(trace, "asks", pictures=pictures[part], prompts=prompts[part], options=options)
            generation = self._generate(pictures[part], prompts[part], options, trace)
            found = [
                self._read(generation, i, request[0], picture.size, options.num_return_sequences)
                for i, (request, picture) in enumerate(zip(requests[part], pictures[part], strict=True))
            ]
            note(trace, "answers", answers=found)
            answers += found
        return answers

    def _generate(
        self,
        pictures: Sequence[EncodedImage],
        prompts: Sequence[list[int]],
        options: GenerationOptions,
        trace: Trace | None,
    ) -> Generation:
        """Prompts of different lengths are padded, and the padding is masked."""
        shapes = {tuple(picture.features.shape[1:]) for picture in pictures}
        width = max(shapes)[-1]
        if len(shapes) > 1 or width != self.model.config.text.d_model:
            raise PromptError(
                f"Encoded pictures of the shapes {sorted(shapes)} come from different models; encode them anew."
            )
        longest = max(map(len, prompts))
        input_ids = torch.full((len(prompts), longest), self.model.config.text.pad_token_id)
        mask = torch.zeros(len(prompts), longest, dtype=torch.bool)
        for row, ids in enumerate(prompts):
            input_ids[row, : len(ids)] = torch.tensor(ids)
            mask[row, : len(ids)] = True
        features = torch.cat([picture.features for picture in pictures]).to(self.model.device, self.model.dtype)
        padding = None if mask.all() else mask.to(self.model.device)
        with torch.no_grad():
            memory = self.model.encode(features, input_ids.to(self.model.device), padding, trace)
        memory_mask = None if padding is None else self.model.memory_mask(features, padding)
        return generate(self.model, memory, options, memory_mask, trace)

    def _read(self, generation: Generation, index: int, task: str, size: tuple[int, int], alternatives: int) -> Answer:
        """The best answer to one request, with the others of its `alternatives` rows."""
        found = []
        for row in range(index * alternatives, (index + 1) * alternatives):
            length = int(generation.lengths[row])
            answer = self.processor.answer(
                task,
                image_size=size,
                token_ids=generation.sequences[row, : 1 + length],
                token_logprobs=generation.token_logprobs[row, :length],
                sequence_score=float(generation.sequence_scores[row]),
                finish_reason=generation.finish_reasons[row],
            )
            found.append(answer)
        return replace(found[0], alternatives=tuple(found[1:]))


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    attention: AttentionKind = "sdpa",
    allow_pickle: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    report: Callable[[str], None] | None = None,
) -> Florence2:
    """A checkpoint by short name ("base"), Hub id, folder or weight file -> a Florence2 that answers.

    A path never touches the network; a name is fetched once (see `hub.download`), at `revision` if given, or not at
    all with `local_files_only`. `device` "auto" takes CUDA, then Apple's MPS, then the CPU; `dtype` "auto" is
    float32 on a CPU and float16, in which the published weights are stored, elsewhere. `allow_pickle` permits
    weights that exist only as a `.bin`. `adapter` is the folder or Hub id of a LoRA adapter, which is merged into the
    weights (see `merge_adapter`). Raises a Florence2Error that says what is wrong and what to do.
    """
    chosen_device = choose_device(device)
    chosen_dtype = choose_dtype(dtype, chosen_device)
    path = resolve(name, revision, local_files_only, allow_pickle, report)
    adapter_folder = None if adapter is None else resolve_adapter(adapter, local_files_only)
    problems: list[Florence2Error] = []
    try:
        processor = Processor.from_folder(checkpoint_folder(path))
    except Florence2Error as error:
        problems.append(error)
    try:
        model = load_model(
            path, device=chosen_device, dtype=chosen_dtype, attention=attention, allow_pickle=allow_pickle
        )
        if adapter_folder is not None:
            merge_adapter(model, adapter_folder)
    except Florence2Error as error:
        problems.append(error)
    if problems:
        raise problems[0] if len(problems) == 1 else CheckpointError("\n".join(map(str, problems)))
    return Florence2(model, processor)


class _EncodeOnce:
    """Encodes the pictures of many requests when their turn comes, and keeps each until its last use."""

    def __init__(self, model: Florence2, pictures: Sequence[Picture]):
        self.model = model
        self.uses_left = Counter(_key(picture) for picture in pictures)
        self.encoded: dict[str | int, EncodedImage] = {}

    def take(self, pictures: Sequence[Picture]) -> list[EncodedImage]:
        """The next requests' pictures, encoded."""
        new = {_key(picture): picture for picture in pictures if _key(picture) not in self.encoded}
        ready = {key: picture for key, picture in new.items() if isinstance(picture, EncodedImage)}
        others = {key: picture for key, picture in new.items() if not isinstance(picture, EncodedImage)}
        prepared = [self.model.prepare_image(picture) for picture in others.values()]
        self.encoded |= ready | dict(zip(others, self.model.encode_images(prepared), strict=True))
        found = [self.encoded[_key(picture)] for picture in pictures]
        for picture in pictures:
            key = _key(picture)
            self.uses_left[key] -= 1
            if not self.uses_left[key]:
                del self.encoded[key]
        return found


def _key(picture: Picture) -> str | int:
    """What makes two pictures of one call the same: their path, or being one object."""
    return str(picture) if isinstance(picture, str | os.PathLike) else id(picture)


_SOME_SIZE = (1 << 30, 1 << 30)  # stands for a picture's until it is opened


def check_request(request: Request) -> None:
    """Raises PromptError for what can be known to be wrong before the picture is opened."""
    if not isinstance(request, tuple) or len(request) not in (2, 3):
        raise PromptError(f"A request must be (task, picture) or (task, picture, input), not {str(request)[:80]}.")
    task, given = request[0], request[2] if len(request) == 3 else None
    is_box = given is not None and not isinstance(given, str) and not any(isinstance(item, str) for item in given)
    found = find_task(task) if isinstance(task, str) else None
    if is_box and found is not None and found.takes != "region":
        raise PromptError(f"Task {found.token} takes no box, but got {given!r}.")
    check_prompt(task, input_to_text(given, _SOME_SIZE))


def _check_vocabulary(config: Florence2Config, known: int) -> None:
    """The embedding has a row for every token, and no more but for the layouts' own reasons: an `<image>` token of
    the native one, and padding to a multiple of 64. Anything else means that ids are shifted."""
    rows, image = config.text.vocab_size, config.image_token_id
    fits = known == rows or (known < rows == -(-known // 64) * 64) if image is None else image <= known <= rows
    if not fits:
        raise CheckpointError(
            f"The tokenizer has {known} tokens, but the model {rows} embeddings"
            + (f", of which {image} are for tokens" if image is not None else "")
            + "; they belong to different checkpoints."
        )
