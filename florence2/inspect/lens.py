"""The logit lens: what the model would have written had it stopped at an earlier layer of the decoder.

The residual stream after each layer goes through the output projection, as only the last one's does in the model
(nostalgebraist, "interpreting GPT: the logit lens", 2020). BART's layers end in their own LayerNorm, so nothing stands
between a layer and the projection, and at the last layer the lens shows the model's own logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.errors import OptionError
from florence2.model.florence2 import Florence2Model
from florence2.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class LogitLens:
    """What each layer says at each token of an answer: T tokens, 1 + L depths, of which the first is the embedding.

    `ids` (T, 1 + L, k) are the likeliest, best first, and `probabilities` (T, 1 + L, k) theirs, before any rule of
    the search. `written` (T, 1 + L) is the probability of the token that the answer has there, `ranks` (T, 1 + L) how
    many ids are likelier.
    """

    ids: Tensor
    probabilities: Tensor
    written: Tensor
    ranks: Tensor


def read_lens(model: Florence2Model, run: Run, k: int = 3, alternative: int = 0) -> LogitLens:
    """Look through the lens at every layer, along the beam that wrote the answer.

    The trace must have kept "=decoder.embedding" and "=decoder.layers.*"; `alternative` as in `run.answer_ids`. One
    layer's logits (T, V) are in memory at a time. Raises OptionError when `k` is not 1 to the size of the vocabulary.
    """
    if type(k) is not int or not 1 <= k <= model.config.text.vocab_size:
        raise OptionError(f"k is {k!r}; it must be 1 to {model.config.text.vocab_size}, the size of the vocabulary.")
    ids = torch.tensor(run.answer_ids(alternative), device=model.device)[:, None]  # (T, 1)
    depths = []
    for name in ["decoder.embedding", *(f"decoder.layers.{i}" for i in range(model.config.text.decoder_layers))]:
        probabilities = project(model, run.along_answer(name, alternative)).softmax(dim=-1)
        written = probabilities.gather(1, ids)
        best = probabilities.topk(k)
        ranks = (probabilities > written).sum(dim=-1)
        depths.append((best.indices, best.values, written[:, 0], ranks))
    return LogitLens(*(torch.stack(values, dim=1) for values in zip(*depths, strict=True)))


@torch.no_grad()
def project(model: Florence2Model, stream: Tensor) -> Tensor:
    """Residual streams (..., D) -> float32 logits (..., V), by the output projection and its bias."""
    logits = F.linear(stream.to(model.device, model.dtype), model.output_weight, model.final_logits_bias[0])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
