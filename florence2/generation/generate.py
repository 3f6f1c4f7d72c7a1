"""A model and its memory -> generated ids: where the model meets the search, or a loop of one's own."""

from dataclasses import replace
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from florence2.errors import Florence2Error, OptionError, PromptError, plain, shown
from florence2.generation.options import GenerationOptions
from florence2.generation.search import search
from florence2.generation.state import Generation, SpecialIds
from florence2.model.config import TextConfig
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import NO_TRACE, Trace


@runtime_checkable
class OwnSearch(Protocol):
    """A model that can run the whole search itself, sooner."""

    def search(
        self, memory: Tensor, options: GenerationOptions, ids: SpecialIds, memory_mask: Tensor | None
    ) -> Generation | None:
        """Return what `generation.search.search` over the model's `step` gives, or None where this does not apply."""
        ...


def generate(
    model: Florence2Model,
    memory: Tensor,
    options: GenerationOptions,
    memory_mask: Tensor | None = None,
    trace: Trace = NO_TRACE,
) -> Generation:
    """Write the answers of B memories together, without gradients.

    Args:
        model: what decodes.
        memory: (B, S, D) from `model.encode`.
        options: the settings of the search. A `max_new_tokens` above the model's positions is lowered to them, so that
            such an answer ends with finish_reason "length".
        memory_mask: (B, S), 1 or True at real positions; None where no prompt was padded.
        trace: sees every step, of all B inputs until the last is done. One that wants attention weights makes the
            attention be computed as it is specified, so numbers may differ by rounding.

    Returns:
        `num_return_sequences` rows an input, best first; samples in the order in which they were drawn. Its tensors
        are ordinary ones: `sequences[:, 1:]` may be the labels of `model.loss`.

    Raises:
        OptionError: a forced id is outside the vocabulary, or extra rules leave no id possible.
        Florence2Error: the memory is not finite.
    """
    check_memory(memory)
    options, ids = fit_options(model.config.text, options), special_ids(model)
    # values that a trace keeps must work outside of inference mode
    with torch.inference_mode() if trace is NO_TRACE else torch.no_grad():
        found = model.search(memory, options, ids, memory_mask) if _searches_itself(model, trace) else None
        found = found or _search(model, memory, options, ids, memory_mask, trace)
    return ordinary(found)


def check_memory(memory: Tensor) -> None:
    """Raise Florence2Error when an encoded image and prompt hold values that are not finite."""
    if not memory.isfinite().all():
        raise not_finite(memory.dtype)


def not_finite(dtype: torch.dtype) -> Florence2Error:
    """Return the error about an encoded image and prompt, in `dtype`, with values that are not finite."""
    return Florence2Error(
        f"The encoded image and prompt hold values that are not finite (in {dtype}): the weights, or what they "
        "compute, do not fit this type; load the model in float32 or bfloat16."
    )


def fit_options(text: TextConfig, options: GenerationOptions) -> GenerationOptions:
    """Lower `max_new_tokens` to the model's positions. Raises OptionError for a forced id outside its vocabulary."""
    return options.fitted(text.vocab_size, text.max_position_embeddings)


def special_ids(model: Florence2Model) -> SpecialIds:
    """Return the ids that a search over `model` must know."""
    text = model.config.text
    return SpecialIds(start=text.decoder_start_token_id, end=text.eos_token_id, pad=text.pad_token_id)


def ordinary(found: Generation) -> Generation:
    """Return a generation whose tensors autograd accepts: a copy, unless it was not made in inference mode."""
    if not found.sequences.is_inference():
        return found
    tensors: dict[str, Any] = {name: value.clone() for name, value in vars(found).items() if isinstance(value, Tensor)}
    return replace(found, **tensors)


def _searches_itself(model: Florence2Model, trace: Trace) -> TypeGuard[OwnSearch]:
    return trace is NO_TRACE and isinstance(model, OwnSearch)


def _search(
    model: Florence2Model,
    memory: Tensor,
    options: GenerationOptions,
    ids: SpecialIds,
    memory_mask: Tensor | None,
    trace: Trace,
) -> Generation:
    cache = model.start_cache(memory, options.width, options.max_new_tokens, memory_mask, trace)
    keep = cache.keep if trace is NO_TRACE else None  # a trace is shown all inputs until the last is done

    def step(newest: Tensor) -> Tensor:
        return model.step(newest, cache, trace)

    return search(step, cache.reorder, len(memory), options, ids, memory.device, keep, trace)


class Stepper:
    """Decodes one id after another over B memories, K sequences each, with a cache: for a search of one's own.

        prompt = torch.tensor([f.processor.prompt("<CAPTION>")])
        with torch.no_grad():
            memory = f.model.encode(f.encode_image("photo.jpg").features, prompt)
        stepper, text = florence2.stepper(f.model, memory, max_length=50), f.model.config.text
        ids = [text.decoder_start_token_id]
        while stepper.length < 50 and ids[1:][-1:] != [text.eos_token_id]:
            logits = stepper.step(torch.tensor(ids[-1:]))  # (1, V)
            ids.append(int(logits.argmax()))  # here goes an idea of one's own
        print(f.processor.decode(ids, skip_special=True))

    It steps as `generate` does, by the faster ways that `load` installed, and without gradients; `model.decode` is the
    way with gradients. The tensors that it returns are ordinary ones. Make it with `florence2.stepper`. It serves one
    loop of one thread; any number of them may share a model.

    Attributes:
        batch: B, the memories that are still decoded.
        beams: K, the sequences of each.
        max_length: How many ids may be read.
    """

    def __init__(self, model: Florence2Model, memory: Tensor, beams: int, max_length: int, memory_mask: Tensor | None):
        self.batch, self.beams, self.max_length = len(memory), beams, max_length
        self._model = model
        with torch.no_grad():
            self._cache = model.start_cache(memory, beams, max_length, memory_mask)

    @property
    def length(self) -> int:
        """How many ids every sequence has read."""
        return self._cache.length

    def step(self, ids: Tensor) -> Tensor:
        """Read the newest id of every sequence.

        Args:
            ids: (B·K,) long; the K sequences of an input stand next to each other. The first is the model's
                `decoder_start_token_id`.

        Returns:
            float32 logits (B·K, V) of the id that follows.

        Raises:
            PromptError: `ids` has another shape, or `max_length` ids were read already.
        """
        if tuple(ids.shape) != (self.batch * self.beams,):
            raise PromptError(
                f"ids has the shape {tuple(ids.shape)}; a step reads one id of every sequence, "
                f"({self.batch * self.beams},)."
            )
        if self.length == self.max_length:
            raise PromptError(f"This stepper has read {self.length} ids, its limit; give a larger max_length.")
        with torch.no_grad():
            return self._model.step(ids.to(self._model.device), self._cache)

    def reorder(self, parents: Tensor) -> None:
        """Let sequence k of input b continue sequence `parents[b, k]`: (B, K) long."""
        if tuple(parents.shape) != (self.batch, self.beams):
            raise PromptError(
                f"parents has the shape {tuple(parents.shape)}; it must be {(self.batch, self.beams)}: for every "
                "sequence the one that it continues."
            )
        with torch.no_grad():
            self._cache.reorder(parents.to(self._model.device))

    def keep(self, rows: Tensor) -> None:
        """Continue with the inputs `rows` (B',) long alone, such as those that have not ended."""
        with torch.no_grad():
            self._cache.keep(rows.to(self._model.device))
        self.batch = len(rows)


def stepper(
    model: Florence2Model,
    memory: Tensor,
    beams: int = 1,
    max_length: int | None = None,
    memory_mask: Tensor | None = None,
) -> Stepper:
    """Start decoding id by id, for a search of one's own; `Stepper` has an example.

    Args:
        model: What decodes, such as `f.model`.
        memory: (B, S, D) from `model.encode`.
        beams: K, how many sequences of each input are decoded side by side.
        max_length: How many ids may be read, the start id included; the keys and values of so many are reserved. None
            is all positions of the model.
        memory_mask: (B, S), 1 or True at real positions; None where no prompt was padded.

    Returns:
        A `Stepper` that has read nothing.

    Raises:
        OptionError: `beams` or `max_length` is out of range.
    """
    positions = model.config.text.max_position_embeddings
    beams, length = plain(beams), positions if max_length is None else plain(max_length)
    if type(beams) is not int or beams < 1:
        raise OptionError(f"beams is {shown(beams)}; it must be a whole number of at least 1.")
    if type(length) is not int or not 1 <= length <= positions:
        raise OptionError(f"max_length is {shown(max_length)}; it must be 1 to {positions}, the model's positions.")
    return Stepper(model, memory, beams, length, memory_mask)
