"""Teacher forcing: how probable an answer is, token by token, under the patches and traces in force.

    case = teacher_force(f, ("<OD>", "photo.jpg"))          # with the model's own answer, or one that is given
    with f.patched({"decoder.layers.2.cross_attention.heads": patches.zero_heads([3])}):
        drop = case.logprobs - answer_logprobs(f, case)     # (T,)

`Florence2Model.decode` reads the answer in one pass, so nothing is searched, and only the part of the model that a
change can affect is computed again: the encoded image and the memory are kept with the case.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from florence2.answers.answer import Answer
from florence2.errors import OptionError, PromptError
from florence2.generation.generate import generate
from florence2.generation.options import GenerationOptions
from florence2.inputs.coordinates import LOCATION, NUM_BINS
from florence2.model.trace import start_trace
from florence2.pipeline import EncodedImage, Florence2, PreparedImage, Request, check_request
from florence2.tracing.names import Name, When

TokenKind = Literal["word", "location", "special"]
"""The kind of a token: `<s>`, `</s>` and `<pad>` are special; a token that is not a location either is (part of) a
word."""
TOKEN_KINDS: tuple[TokenKind, ...] = ("word", "location", "special")
Stage = Literal["image", "prompt", "answer"]
"""The stage from which a run is computed again: encoding the image, encoding the prompt, or decoding the answer."""
_SPECIAL = frozenset(("<s>", "</s>", "<pad>"))


@dataclass(frozen=True, eq=False)
class ForcedAnswer:
    """A request with an answer to be scored, and the scores of the model without patches.

    Attributes:
        request: (task, image) or (task, image, input).
        prepared: The image before the vision tower; None when the request has an encoded one.
        encoded: The image after the projection.
        prompt_ids: The P ids of the prompt.
        answer: The answer, of T ids after the start id.
        kinds: The kind of each of the T ids.
        counted: For each of the T ids, True when the model chose it and False when its settings force it.
        memory: (1, S, D), the output of the encoder.
        logprobs: (T,) log-probabilities of the ids, before any rule of the search.
        bins: (T,) the most probable location at each place, as a bin 0..999.
    """

    request: Request
    prepared: PreparedImage | None
    encoded: EncodedImage
    prompt_ids: tuple[int, ...]
    answer: Answer
    kinds: tuple[TokenKind, ...]
    counted: tuple[bool, ...]
    memory: Tensor
    logprobs: Tensor
    bins: Tensor

    @property
    def inputs(self) -> Tensor:
        """The decoder's input, (1, T): at position n it predicts id n + 1 of the answer."""
        return torch.tensor([self.answer.token_ids[:-1]], device=self.memory.device)

    def positions(self, kind: TokenKind | None = None) -> list[int]:
        """Return the positions, of 0 to T - 1, of the counted ids.

        Args:
            kind: Keep only ids of this kind; all by default.

        Returns:
            The positions in order.
        """
        rows = zip(self.kinds, self.counted, strict=True)
        return [n for n, (own, counted) in enumerate(rows) if counted and kind in (None, own)]


def teacher_force(
    f: Florence2, request: Request, answer: str | Answer | None = None, options: GenerationOptions | None = None
) -> ForcedAnswer:
    """Score an answer to a request without any patch.

    Args:
        f: The model. Patches and traces in force are ignored.
        request: (task, image) or (task, image, input).
        answer: A text or an `Answer`; by default the model's own answer.
        options: Generation settings for the model's own answer; the model's defaults if omitted.

    Returns:
        The answer with its scores.

    Raises:
        PromptError: The request is not valid, as in `f.run`, or the text is longer than the model's positions.
        ImageError: The image cannot be read.
    """
    check_request(request, f.processor.tasks)
    image = request[1]
    if isinstance(image, EncodedImage):
        return _make_case(f, request, None, image, answer, options or f.options())
    prepared = f.prepare_image(image)
    return _make_case(f, request, prepared, _encode_image(f, prepared), answer, options or f.options())


def teacher_force_all(
    f: Florence2, requests: Iterable[Request], options: GenerationOptions | None = None
) -> list[ForcedAnswer]:
    """Score the own answers of several requests, encoding each image once. Raises OptionError for no request."""
    cases: list[ForcedAnswer] = []
    by_image: dict[object, ForcedAnswer] = {}
    for request in requests:
        check_request(request, f.processor.tasks)
        image = request[1]
        key = str(image) if isinstance(image, str | os.PathLike) else id(image)
        before = by_image.get(key)
        if before is None:
            case = by_image[key] = teacher_force(f, request, options=options)
        else:
            case = _make_case(f, request, before.prepared, before.encoded, None, options or f.options())
        cases.append(case)
    if not cases:
        raise OptionError("No request to measure; give at least one (task, image).")
    return cases


def _make_case(
    f: Florence2,
    request: Request,
    prepared: PreparedImage | None,
    encoded: EncodedImage,
    answer: str | Answer | None,
    options: GenerationOptions,
) -> ForcedAnswer:
    task, text = request[0], request[2] if len(request) == 3 else None
    prompt = f.processor.prompt(task, text, encoded.size)
    with torch.no_grad():
        memory = f.model.encode(encoded.features, torch.tensor([prompt], device=f.model.device))
        if answer is None:
            answer = _own_answer(f, task, memory, encoded, options)
        elif isinstance(answer, str):
            answer = _read(f, task, answer, encoded)
        logits = f.model.decode(torch.tensor([answer.token_ids[:-1]], device=f.model.device), memory)[0]
    scores, ids = logits.log_softmax(dim=-1), answer.token_ids[1:]  # scores (T, V)
    return ForcedAnswer(
        request=request,
        prepared=prepared,
        encoded=encoded,
        prompt_ids=tuple(prompt),
        answer=answer,
        kinds=tuple(_kind(f.processor.decode([id])) for id in ids),
        counted=tuple(not _is_forced(n, ids, answer, options) for n in range(len(ids))),
        memory=memory,
        logprobs=of_ids(scores, ids),
        bins=likeliest_bins(f, scores),
    )


def answer_scores(f: Florence2, case: ForcedAnswer, since: Stage = "answer") -> Tensor:
    """Score every id at every place of an answer, under the patches and traces in force.

    Args:
        f: The model.
        case: The request and its answer.
        since: The stage from which the run is computed again. A patch acts only at this stage and later ones.

    Returns:
        (T, V) log-probabilities of every id at each place, given the answer's ids before it.

    Raises:
        OptionError: `since` is "image" and the request has an encoded image.
    """
    trace, device = start_trace(f), f.model.device
    memory = case.memory
    with torch.no_grad():
        if since != "answer":
            encoded = encode_again(f, case) if since == "image" else case.encoded
            prompt = torch.tensor([case.prompt_ids], device=device)
            memory = f.model.encode(encoded.features.to(device, f.model.dtype), prompt, trace=trace)
        return f.model.decode(case.inputs, memory, trace=trace)[0].log_softmax(dim=-1)


def answer_logprobs(f: Florence2, case: ForcedAnswer, since: Stage = "answer") -> Tensor:
    """Score the answer's own ids, under the patches and traces in force.

    Args:
        f: The model.
        case: The request and its answer.
        since: As in `answer_scores`.

    Returns:
        (T,) log-probabilities; without patches they equal `case.logprobs`.

    Raises:
        OptionError: As in `answer_scores`.
    """
    return of_ids(answer_scores(f, case, since), case.answer.token_ids[1:])


def of_ids(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """Pick the scores of T ids: (T, V) -> (T,)."""
    return scores.gather(1, torch.tensor(ids, device=scores.device)[:, None])[:, 0]


def likeliest_bins(f: Florence2, scores: Tensor) -> Tensor:
    """Return the most probable location at each place, as a bin 0..999: scores (T, V) -> (T,)."""
    first = f.processor.tokenizer.token_id("<loc_0>")
    assert first is not None, "every checkpoint has the location tokens"
    return scores[:, first : first + NUM_BINS].argmax(dim=-1)


def answer_again(f: Florence2, case: ForcedAnswer, since: Stage, options: GenerationOptions | None = None) -> Answer:
    """Generate a new answer to the request, under the patches and traces in force."""
    text = case.request[2] if len(case.request) == 3 else None
    encoded = encode_again(f, case) if since == "image" else case.encoded
    return f.run(case.request[0], encoded, text, options=options)


def encode_again(f: Florence2, case: ForcedAnswer) -> EncodedImage:
    """Run the vision tower on the image again. Raises OptionError when the request has an encoded image."""
    if case.prepared is None:
        raise OptionError(
            "A change inside the vision tower needs the image itself, but the request has an encoded one; give the "
            "image."
        )
    return f.encode_images([case.prepared])[0]


def stage_of(names: Sequence[Name]) -> Stage:
    """Return the stage from which a run must be computed again when values of these names change."""
    stages: dict[When, Stage] = {"image": "image", "prompt": "prompt", "answer": "answer", "step": "answer"}
    needed = {stages[name.when] for name in names}
    return "image" if "image" in needed else "prompt" if "prompt" in needed else "answer"


def _encode_image(f: Florence2, prepared: PreparedImage) -> EncodedImage:
    with torch.no_grad():
        return EncodedImage(f.model.encode_image(f.pixel_values([prepared])), prepared.size)


def _own_answer(f: Florence2, task: str, memory: Tensor, encoded: EncodedImage, options: GenerationOptions) -> Answer:
    """Answer as `f.run` does, without the patches and traces in force on `f`."""
    generation = generate(f.model, memory, options)
    length = int(generation.lengths[0])
    ids, reason = generation.sequences[0, : 1 + length], generation.finish_reasons[0]
    return f.processor.answer(task, image_size=encoded.size, token_ids=ids, finish_reason=reason)


def _read(f: Florence2, task: str, text: str, encoded: EncodedImage) -> Answer:
    ids, limit = f.processor.encode(text), f.model.config.text.max_position_embeddings
    if len(ids) > limit:
        raise PromptError(f"The answer has {len(ids)} ids, more than the {limit} positions of the model; shorten it.")
    start = f.model.config.text.decoder_start_token_id
    return f.processor.answer(task, image_size=encoded.size, token_ids=[start, *ids])


def _kind(piece: str) -> TokenKind:
    return "special" if piece in _SPECIAL else "location" if LOCATION.fullmatch(piece) else "word"


def _is_forced(n: int, ids: Sequence[int], answer: Answer, options: GenerationOptions) -> bool:
    """Return whether the search had no choice: settings may force the first id, and the last of an answer cut short."""
    if n == 0:
        return options.forced_bos_token_id == ids[0]
    cut = answer.finish_reason == "length" and n == len(ids) - 1
    return cut and options.forced_eos_token_id == ids[n]
