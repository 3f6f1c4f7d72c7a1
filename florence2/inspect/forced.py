"""Teacher forcing: how probable an answer is, token by token, under whatever patches and traces are in force.

    case = force(f, ("<OD>", "photo.jpg"))                  # with the model's own answer, or one that is given
    with f.patched({"decoder.layers.2.cross_attention.heads": zero_heads([3])}):
        drop = case.logprobs - answer_logprobs(f, case)     # (T,)

The answer is read in one go by `Florence2Model.decode`, so nothing is searched, and only what a change can reach is
computed again: the picture's encoding and the memory are kept with the case.
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

Kind = Literal["word", "location", "special"]
"""What a token is: `<s>`, `</s>` and `<pad>` are special, what is neither that nor a location is (part of) a word."""
KINDS: tuple[Kind, ...] = ("word", "location", "special")
Stage = Literal["picture", "prompt", "answer"]
"""From where on a run is computed again: the picture's encoding, the memory, or the answer alone."""
_SPECIAL = frozenset(("<s>", "</s>", "<pad>"))


@dataclass(frozen=True, eq=False)
class Case:
    """A request, and an answer to it that is to be scored. T is the number of the answer's ids after the start id."""

    request: Request
    prepared: PreparedImage | None
    """The picture before the vision tower; None when it was given encoded."""
    encoded: EncodedImage
    prompt_ids: tuple[int, ...]
    answer: Answer
    kinds: tuple[Kind, ...]
    """What each of the T ids is."""
    counted: tuple[bool, ...]
    """Which of the T ids the model chose: not those that its settings force."""
    memory: Tensor
    """(1, S, D), unpatched."""
    logprobs: Tensor
    """(T,) of the ids after the start id, unpatched, before any rule of the search."""
    bins: Tensor
    """(T,): the location that is most probable at each of their places, unpatched, as a bin."""

    @property
    def inputs(self) -> Tensor:
        """What the decoder reads: (1, T), of which position n is where id n + 1 of the answer is foretold."""
        return torch.tensor([self.answer.token_ids[:-1]], device=self.memory.device)

    def positions(self, kind: Kind | None = None) -> list[int]:
        """Where in the T the ids are that count, of one kind if given."""
        rows = zip(self.kinds, self.counted, strict=True)
        return [n for n, (own, counted) in enumerate(rows) if counted and kind in (None, own)]


def force(
    f: Florence2, request: Request, answer: str | Answer | None = None, options: GenerationOptions | None = None
) -> Case:
    """A request, (task, picture) or (task, picture, input), with an answer: the model's own, another's, or a text.

    Patches in force take no part in it. `options` are of the search for the model's own answer. Raises PromptError and
    ImageError as `f.run` does, and PromptError for a text that is longer than the model's positions.
    """
    check_request(request)
    image = request[1]
    if isinstance(image, EncodedImage):
        return _make_case(f, request, None, image, answer, options or f.options())
    prepared = f.prepare_image(image)
    return _make_case(f, request, prepared, _encode_image(f, prepared), answer, options or f.options())


def force_all(f: Florence2, requests: Iterable[Request], options: GenerationOptions | None = None) -> list[Case]:
    """`force` of several, of which those that are about one picture share its encoding. Raises OptionError for none."""
    cases: list[Case] = []
    seen: dict[object, Case] = {}
    for request in requests:
        check_request(request)
        image = request[1]
        key = str(image) if isinstance(image, str | os.PathLike) else id(image)
        before = seen.get(key)
        if before is None:
            case = seen[key] = force(f, request, options=options)
        else:
            case = _make_case(f, request, before.prepared, before.encoded, None, options or f.options())
        cases.append(case)
    if not cases:
        raise OptionError("There is no request to measure on; give at least one (task, picture).")
    return cases


def _make_case(
    f: Florence2,
    request: Request,
    prepared: PreparedImage | None,
    encoded: EncodedImage,
    answer: str | Answer | None,
    options: GenerationOptions,
) -> Case:
    task, given = request[0], request[2] if len(request) == 3 else None
    prompt = f.processor.prompt(task, given, encoded.size)
    with torch.no_grad():
        memory = f.model.encode(encoded.features, torch.tensor([prompt], device=f.model.device))
        if answer is None:
            found = _own_answer(f, task, memory, encoded, options)
        else:
            found = answer if isinstance(answer, Answer) else _read(f, task, answer, encoded)
        logits = f.model.decode(torch.tensor([found.token_ids[:-1]], device=f.model.device), memory)[0]
    scores, ids = logits.log_softmax(dim=-1), found.token_ids[1:]
    return Case(
        request=request,
        prepared=prepared,
        encoded=encoded,
        prompt_ids=tuple(prompt),
        answer=found,
        kinds=tuple(_kind(f.processor.decode([id])) for id in ids),
        counted=tuple(not _is_forced(n, ids, found, options) for n in range(len(ids))),
        memory=memory,
        logprobs=of_ids(scores, ids),
        bins=likeliest_bins(f, scores),
    )


def answer_scores(f: Florence2, case: Case, since: Stage = "answer") -> Tensor:
    """Log-probabilities (T, V) of every id where each of the answer's ids stands, given those before it.

    Whatever is in force on `f` in this thread acts, on what comes after `since`. Raises OptionError when the picture
    is to be encoded again and was given encoded.
    """
    trace, device = start_trace(f), f.model.device
    memory = case.memory
    with torch.no_grad():
        if since != "answer":
            encoded = encode_again(f, case) if since == "picture" else case.encoded
            prompt = torch.tensor([case.prompt_ids], device=device)
            memory = f.model.encode(encoded.features.to(device, f.model.dtype), prompt, trace=trace)
        return f.model.decode(case.inputs, memory, trace=trace)[0].log_softmax(dim=-1)


def answer_logprobs(f: Florence2, case: Case, since: Stage = "answer") -> Tensor:
    """The same of the answer's own ids: (T,), as `case.logprobs` is without any patch."""
    return of_ids(answer_scores(f, case, since), case.answer.token_ids[1:])


def of_ids(scores: Tensor, ids: Sequence[int]) -> Tensor:
    """Scores (T, V) -> those of T ids: (T,)."""
    return scores.gather(1, torch.tensor(ids, device=scores.device)[:, None])[:, 0]


def likeliest_bins(f: Florence2, scores: Tensor) -> Tensor:
    """Scores (T, V) -> the location that is most probable at each place, as a bin 0..999: (T,)."""
    first = f.processor.tokenizer.token_id("<loc_0>")
    assert first is not None, "every checkpoint has the location tokens"
    return scores[:, first : first + NUM_BINS].argmax(dim=-1)


def answer_again(f: Florence2, case: Case, since: Stage, options: GenerationOptions | None = None) -> Answer:
    """The request asked anew, with a search, under whatever is in force."""
    given = case.request[2] if len(case.request) == 3 else None
    encoded = encode_again(f, case) if since == "picture" else case.encoded
    return f.run(case.request[0], encoded, given, options=options)


def encode_again(f: Florence2, case: Case) -> EncodedImage:
    """The picture through the vision tower once more. Raises OptionError when it was given encoded."""
    if case.prepared is None:
        raise OptionError(
            "A change inside the vision tower needs the picture itself, but the request has an encoded one; give the "
            "picture."
        )
    return f.encode_images([case.prepared])[0]


def stage_of(names: Sequence[Name]) -> Stage:
    """From where on a run must be computed again when values of these names change."""
    stages: dict[When, Stage] = {"picture": "picture", "prompt": "prompt", "answer": "answer", "step": "answer"}
    found = {stages[name.when] for name in names}
    return "picture" if "picture" in found else "prompt" if "prompt" in found else "answer"


def _encode_image(f: Florence2, prepared: PreparedImage) -> EncodedImage:
    with torch.no_grad():
        return EncodedImage(f.model.encode_image(prepared.pixel_values), prepared.size)


def _own_answer(f: Florence2, task: str, memory: Tensor, encoded: EncodedImage, options: GenerationOptions) -> Answer:
    """What `f.run` answers, without whatever is in force on `f`."""
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


def _kind(piece: str) -> Kind:
    return "special" if piece in _SPECIAL else "location" if LOCATION.fullmatch(piece) else "word"


def _is_forced(n: int, ids: Sequence[int], answer: Answer, options: GenerationOptions) -> bool:
    """Whether the search had no choice: the first id, and that of an answer cut short, may be set."""
    if n == 0:
        return options.forced_bos_token_id == ids[0]
    cut = answer.finish_reason == "length" and n == len(ids) - 1
    return cut and options.forced_eos_token_id == ids[n]
