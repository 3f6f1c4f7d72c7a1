"""A model and its memory -> generated ids: where the model and the search meet, by the fastest way that is exact."""

import torch
from torch import Tensor

from florence2.errors import Florence2Error, OptionError
from florence2.fast.graphs import generate_graphed
from florence2.fast.packed import packed_decoder
from florence2.generation.options import GenerationOptions
from florence2.generation.search import Generation, SpecialIds, Step, search
from florence2.model.bart import DecoderCache
from florence2.model.florence2 import Florence2Model, decodes_as_built
from florence2.model.trace import Trace


def generate(
    model: Florence2Model,
    memory: Tensor,
    options: GenerationOptions,
    memory_mask: Tensor | None = None,
    trace: Trace | None = None,
) -> Generation:
    """Write the answers of B memories at once.

    `memory` (B, S, D) from `model.encode`; `memory_mask` (B, S), 1 or True at real positions, where prompts were
    padded. Returns `num_return_sequences` rows per input, best first. No gradients. A `max_new_tokens` beyond the
    model's positions is lowered to them, so that such an answer ends with finish_reason "length".
    Raises OptionError for forced ids outside the vocabulary, and Florence2Error for a memory that is not finite.

    On a CPU in float32 the decoder's weights are packed at the first call and kept beside the model's own (base:
    0.36 GB), for a step three times as fast; a model loaded with `attention="eager"` goes without.

    A `trace` is shown every step, of all B inputs until the last is done. One that wants attention weights makes the
    attention be computed as it is specified, so that numbers may differ by rounding.
    """
    if not memory.isfinite().all():
        raise Florence2Error(
            f"The encoded picture and prompt hold values that are not finite (in {memory.dtype}): the weights, or what "
            "they compute, do not fit this type; load the model in float32 or bfloat16."
        )
    text = model.config.text
    for id in (options.forced_bos_token_id, options.forced_eos_token_id):
        if id is not None and id >= text.vocab_size:
            raise OptionError(f"The forced id {id} is outside this model's vocabulary of {text.vocab_size} ids.")
    # the last id is generated, but never read: so as many can be generated as there are positions
    options = options.changed(max_new_tokens=min(options.max_new_tokens, text.max_position_embeddings))
    ids = SpecialIds(start=text.decoder_start_token_id, end=text.eos_token_id, pad=text.pad_token_id)
    # what a trace keeps shall be usable like any tensor
    with torch.inference_mode() if trace is None else torch.no_grad():
        if trace is None and memory.device.type == "cuda" and decodes_as_built(model):
            return generate_graphed(model, memory, options, ids, memory_mask)
        cache = model.start_cache(memory, options.num_beams, options.max_new_tokens, memory_mask, trace)
        step, keep = _choose_step(model, cache, trace), cache.keep if trace is None else None
        return search(step, cache.reorder, len(memory), options, ids, memory.device, keep, trace)


def _choose_step(model: Florence2Model, cache: DecoderCache, trace: Trace | None) -> Step:
    """The packed step where it can be used."""
    step = (packed_decoder(model) or model).step
    return lambda newest: step(newest, cache, trace)
