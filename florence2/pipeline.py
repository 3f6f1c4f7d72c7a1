"""Florence2: pictures and tasks in, answers out. `load` puts everything together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor

from florence2.answers import Answer, Box
from florence2.attention import AttentionKind
from florence2.checkpoint import checkpoint_folder, load_model
from florence2.coordinates import bins_to_tokens, quantize
from florence2.decoding import Generation, GenerationOptions
from florence2.errors import CheckpointError, OptionError, PromptError
from florence2.generation import generate
from florence2.hub import DEFAULT_MODEL, resolve
from florence2.image import ImageInput, image_to_tensor, open_image
from florence2.model import Florence2Model
from florence2.processor import Processor, TaskText, input_to_text
from florence2.tasks import check_prompt

Detail = Literal["short", "detailed", "more_detailed"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CAPTIONS = {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "more_detailed": "<MORE_DETAILED_CAPTION>"}


@dataclass(frozen=True)
class EncodedImage:
    """A picture after the vision tower, the expensive part; every task on it may start from here.

    `features` (1, N, D) on the model's device; `size` is (width, height) of the upright picture in pixels.
    """

    features: Tensor
    size: tuple[int, int]


Picture: TypeAlias = "ImageInput | EncodedImage"
Request: TypeAlias = "tuple[str, Picture] | tuple[str, Picture, TaskText]"


@dataclass(frozen=True)
class Cascade:
    """A caption, its phrases found in the picture, and the outline of each."""

    caption: Answer
    grounding: Answer
    segments: tuple[Answer, ...]
    """One for each box of `grounding`, in its order; the polygons bear the box's phrase."""

    def to_dict(self, tokens: bool = False) -> dict[str, Any]:
        """Plain JSON values: one answer, one answer, a list of answers."""
        return {
            "caption": self.caption.to_dict(tokens),
            "grounding": self.grounding.to_dict(tokens),
            "segments": [segment.to_dict(tokens) for segment in self.segments],
        }

    def draw(self, image: ImageInput) -> Image.Image:
        """The picture with every phrase's boxes and filled outlines."""
        outlines = tuple(polygon for segment in self.segments for polygon in segment.polygons)
        return replace(self.grounding, polygons=outlines).draw(image)

    def __str__(self) -> str:
        segments = "\n".join(str(segment) for segment in self.segments)
        return "\n".join(part for part in (str(self.caption), str(self.grounding), segments) if part)


class Florence2:
    """One checkpoint, ready to answer. Holds nothing that changes, so threads may share it."""

    def __init__(self, model: Florence2Model, processor: Processor):
        """Join the two. Raises CheckpointError when the tokenizer knows ids that the model has no embedding for."""
        if processor.tokenizer.vocab_size > model.config.text.vocab_size:
            raise CheckpointError(
                f"The tokenizer has {processor.tokenizer.vocab_size} tokens, the model only "
                f"{model.config.text.vocab_size} embeddings; they belong to different checkpoints."
            )
        self.model, self.processor = model, processor
        try:
            self._options = GenerationOptions.from_checkpoint(model.config.generation)
        except OptionError as error:
            raise CheckpointError(f"The checkpoint's own generation settings cannot be used: {error}") from None

    def options(self, **changes: Any) -> GenerationOptions:
        """The checkpoint's own generation settings, with some changed. Raises OptionError for what does not exist."""
        return self._options.changed(**changes)

    def encode_image(self, image: ImageInput) -> EncodedImage:
        """Run the vision tower on a picture (see `open_image`), once for all tasks to come."""
        return self._encode([open_image(image)])[0]

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

        Every answer has the tokens that it has alone. `batch_size` is how many are computed at once; a picture that
        occurs several times is encoded once. Raises like `run`, before anything is computed for a bad prompt.
        """
        if batch_size < 1:
            raise OptionError(f"batch_size is {batch_size}; it must be at least 1.")
        options = options or self._options
        answers: list[Answer] = []
        for start in range(0, len(requests), batch_size):
            answers += self._answer(requests[start : start + batch_size], options)
        return answers

    def caption(self, image: Picture, detail: Detail = "short") -> Answer:
        """Describe the picture in a sentence ("short"), in a few ("detailed"), or in a paragraph ("more_detailed")."""
        if detail not in _CAPTIONS:
            raise PromptError(f"detail is {detail!r}; it must be one of {', '.join(_CAPTIONS)}.")
        return self.run(_CAPTIONS[detail], image)

    def detect(self, image: Picture, classes: str | Sequence[str] | None = None) -> Answer:
        """Boxes of everything the model knows, or of the `classes` named (open vocabulary)."""
        return self.run("<OD>", image) if classes is None else self.run("<OPEN_VOCABULARY_DETECTION>", image, classes)

    def ground(self, image: Picture, caption: str) -> Answer:
        """Boxes of the phrases of `caption`."""
        return self.run("<CAPTION_TO_PHRASE_GROUNDING>", image, caption)

    def segment(self, image: Picture, text: str | None = None, *, box: Sequence[float] | None = None) -> Answer:
        """The outline of what `text` refers to, or of what is in `box` (pixels)."""
        task = "<REFERRING_EXPRESSION_SEGMENTATION>" if box is None else "<REGION_TO_SEGMENTATION>"
        return self.run(task, image, text, box=box)

    def ocr(self, image: Picture, *, regions: bool = False, box: Sequence[float] | None = None) -> Answer:
        """The text in the picture, as quads with their lines when `regions` is set, or only that inside `box`."""
        if box is not None:
            return self.run("<REGION_TO_OCR>", image, box=box)
        return self.run("<OCR_WITH_REGION>" if regions else "<OCR>", image)

    def describe(self, image: Picture, box: Sequence[float]) -> Answer:
        """What is in `box` (pixels), in words."""
        return self.run("<REGION_TO_DESCRIPTION>", image, box=box)

    def cascade(self, image: Picture, detail: Detail = "short", *, options: GenerationOptions | None = None) -> Cascade:
        """Caption the picture, find the caption's phrases in it, and outline each: one encoding, many answers."""
        if detail not in _CAPTIONS:
            raise PromptError(f"detail is {detail!r}; it must be one of {', '.join(_CAPTIONS)}.")
        encoded = image if isinstance(image, EncodedImage) else self.encode_image(image)
        caption = self.run(_CAPTIONS[detail], encoded, options=options)
        phrases = caption.text.strip()
        if not phrases:
            nothing = self.processor.answer("<CAPTION_TO_PHRASE_GROUNDING>", "", image_size=encoded.size)
            return Cascade(caption, nothing, ())
        grounding = self.run("<CAPTION_TO_PHRASE_GROUNDING>", encoded, phrases, options=options)
        regions = [bins_to_tokens(quantize(box.xyxy, encoded.size)) for box in grounding.boxes]
        requests: list[Request] = [("<REGION_TO_SEGMENTATION>", encoded, region) for region in regions]
        segments = self.run_batch(requests, options=options)
        labelled = zip(segments, grounding.boxes, strict=True)
        return Cascade(caption, grounding, tuple(_labelled(segment, box) for segment, box in labelled))

    def _answer(self, requests: Sequence[Request], options: GenerationOptions) -> list[Answer]:
        """One batch. All prompts are checked before the first picture is encoded."""
        pictures = _open_once([request[1] for request in requests])
        tasks = [request[0] for request in requests]
        inputs = [
            input_to_text(request[2] if len(request) == 3 else None, picture.size)
            for request, picture in zip(requests, pictures, strict=True)
        ]
        for task, text in zip(tasks, inputs, strict=True):
            check_prompt(task, text)
        prompts = [self.processor.prompt(task, text) for task, text in zip(tasks, inputs, strict=True)]
        generation = self._generate(self._encode(pictures), prompts, options)
        rows = options.num_return_sequences
        answers = []
        for i, (task, picture) in enumerate(zip(tasks, pictures, strict=True)):
            best, *others = (self._read(generation, row, task, picture.size) for row in range(i * rows, (i + 1) * rows))
            answers.append(replace(best, alternatives=tuple(others)))
        return answers

    def _encode(self, pictures: Sequence[Image.Image | EncodedImage]) -> list[EncodedImage]:
        """Every picture encoded; the same object only once."""
        encoded = {id(picture): picture for picture in pictures if isinstance(picture, EncodedImage)}
        new = {id(picture): picture for picture in pictures if isinstance(picture, Image.Image)}
        # A batch through the vision tower saves time where launching work is what costs; on a CPU it only costs memory.
        at_once = 1 if self.model.device.type == "cpu" else len(new)
        keys = list(new)
        for start in range(0, len(keys), at_once or 1):
            part = keys[start : start + at_once]
            pixel_values = torch.cat([image_to_tensor(new[key], self.processor.image_config) for key in part])
            with torch.no_grad():
                features = self.model.encode_image(pixel_values)
            for i, key in enumerate(part):
                encoded[key] = EncodedImage(features[i : i + 1], new[key].size)
        return [encoded[id(picture)] for picture in pictures]

    def _generate(
        self, pictures: Sequence[EncodedImage], prompts: Sequence[list[int]], options: GenerationOptions
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
        features = torch.cat([picture.features for picture in pictures])
        padding = None if mask.all() else mask.to(self.model.device)
        with torch.no_grad():
            memory = self.model.encode(features, input_ids.to(self.model.device), padding)
        memory_mask = None if padding is None else self.model.memory_mask(features, padding)
        return generate(self.model, memory, options, memory_mask)

    def _read(self, generation: Generation, row: int, task: str, size: tuple[int, int]) -> Answer:
        length = int(generation.lengths[row])
        return self.processor.answer(
            task,
            image_size=size,
            token_ids=generation.sequences[row, : 1 + length],
            token_logprobs=generation.token_logprobs[row, :length],
            sequence_score=float(generation.sequence_scores[row]),
            finish_reason=generation.finish_reasons[row],
        )


def load(
    name: str | os.PathLike[str] = DEFAULT_MODEL,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    local_files_only: bool = False,
    attention: AttentionKind = "sdpa",
    allow_pickle: bool = False,
) -> Florence2:
    """A checkpoint by short name ("base"), Hub id, folder or weight file -> a Florence2 that answers.

    A path never touches the network; a name is fetched once (see `hub.download`), at `revision` if given, or not at
    all with `local_files_only`. `device` "auto" takes CUDA, then Apple's MPS, then the CPU; `dtype` "auto" is
    float32 on a CPU and float16, in which the published weights are stored, elsewhere. `allow_pickle` permits
    weights that exist only as a `.bin`. Raises a Florence2Error that says what is wrong and what to do.
    """
    path = resolve(name, revision, local_files_only, allow_pickle)
    chosen_device = choose_device(device)
    model = load_model(
        path,
        device=chosen_device,
        dtype=choose_dtype(dtype, chosen_device),
        attention=attention,
        allow_pickle=allow_pickle,
    )
    return Florence2(model, Processor.from_folder(checkpoint_folder(path)))


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" or a torch device name -> the device. Raises OptionError when it does not exist here."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).split("\n")[0]
        raise OptionError(f"The device {str(device)!r} cannot be used here: {reason}") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" or the name of a type -> the type. Raises OptionError for others than the three in use."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise OptionError(f"The type {dtype!s} is not supported; choose one of auto, {', '.join(DTYPES)}.")
    return chosen


def _open_once(pictures: Sequence[Picture]) -> list[Image.Image | EncodedImage]:
    """Every picture opened; the same path or object only once."""
    opened: dict[Any, Image.Image | EncodedImage] = {}
    keys = [str(p) if isinstance(p, str | os.PathLike) else id(p) for p in pictures]
    for key, picture in zip(keys, pictures, strict=True):
        if key not in opened:
            opened[key] = picture if isinstance(picture, EncodedImage) else open_image(picture)
    return [opened[key] for key in keys]


def _labelled(segment: Answer, box: Box) -> Answer:
    return replace(segment, polygons=tuple(replace(polygon, label=box.label) for polygon in segment.polygons))
