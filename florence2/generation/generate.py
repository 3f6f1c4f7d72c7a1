"""A model and its memory -> generated ids: where the model and the search meet."""

from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from florence2.errors import Florence2Error, OptionError
from florence2.generation.options import GenerationOptions
from florence2.generation.search import search
from florence2.generation.state import Generation, SpecialIds
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
        `num_return_sequences` rows an input, best first.

    Raises:
        OptionError: a forced id is outside the vocabulary.
        Florence2Error: the memory is not finite.
    """
    if not memory.isfinite().all():
        raise Florence2Error(
            f"The encoded image and prompt hold values that are not finite (in {memory.dtype}): the weights, or what "
            "they compute, do not fit this type; load the model in float32 or bfloat16."
        )
    text = model.config.text
    for id in (options.forced_bos_token_id, options.forced_eos_token_id):
        if id is not None and id >= text.vocab_size:
            raise OptionError(f"The forced id {id} is outside this model's vocabulary of {text.vocab_size} ids.")
    # the last id is generated but never read, so as many can be generated as there are positions
    options = options.changed(max_new_tokens=min(options.max_new_tokens, text.max_position_embeddings))
    ids = SpecialIds(start=text.decoder_start_token_id, end=text.eos_token_id, pad=text.pad_token_id)
    # what a trace keeps shall be usable like any tensor
    with torch.inference_mode() if trace is NO_TRACE else torch.no_grad():
        found = model.search(memory, options, ids, memory_mask) if _searches_itself(model, trace) else None
        return found or _search(model, memory, options, ids, memory_mask, trace)


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
