"""The logit lens: what the model would have written had it stopped at an earlier layer of the decoder.

The residual stream after each layer goes through the output projection, as only the last layer's does in the model
(nostalgebraist, "interpreting GPT: the logit lens", 2020). BART's layers end in their own LayerNorm, so nothing stands
between a layer and the projection, and at the last layer the lens shows the model's own logits.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from florence2.errors import OptionError, plain
from florence2.model.florence2 import Florence2Model
from florence2.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class LogitLens:
    """The prediction of each of L decoder layers at each of the T tokens of an answer, before any rule of the search.

    The second dimension is the depth: the embedding, then the L layers.

    Attributes:
        ids: (T, 1 + L, k), the most probable ids, best first.
        probabilities: (T, 1 + L, k), their probabilities.
        written: (T, 1 + L), the probability of the token that the answer has there.
        ranks: (T, 1 + L), the number of ids that are more probable than it.
    """

    ids: Tensor
    probabilities: Tensor
    written: Tensor
    ranks: Tensor


def logit_lens(model: Florence2Model, run: Run, k: int = 3, alternative: int = 0) -> LogitLens:
    """Read the prediction of every decoder layer, along the beam that wrote the answer.

    Only one layer's logits (T, V) exist at a time.

    Args:
        model: The model of the run, `f.model`.
        run: A run whose trace kept "=decoder.embedding" and "=decoder.layers.*".
        k: The number of ids to keep at each depth, 1 to the size of the vocabulary.
        alternative: As in `run.answer_ids`.

    Returns:
        The predictions.

    Raises:
        OptionError: `k` is out of range, the values were not kept, or the run has no such alternative.
    """
    k = plain(k)
    if type(k) is not int or not 1 <= k <= model.config.text.vocab_size:
        raise OptionError(f"k is {k!r}; it must be 1 to {model.config.text.vocab_size}, the size of the vocabulary.")
    ids = torch.tensor(run.answer_ids(alternative), device=model.device)[:, None]  # (T, 1)
    depths = []
    for name in ["decoder.embedding", *(f"decoder.layers.{i}" for i in range(model.config.text.decoder_layers))]:
        probabilities = project(model, run.along_answer(name, alternative)).softmax(dim=-1)  # (T, V)
        written = probabilities.gather(1, ids)  # (T, 1)
        best = probabilities.topk(k)
        ranks = (probabilities > written).sum(dim=-1)
        depths.append((best.indices, best.values, written[:, 0], ranks))
    return LogitLens(*(torch.stack(values, dim=1) for values in zip(*depths, strict=True)))


@torch.no_grad()
def project(model: Florence2Model, stream: Tensor) -> Tensor:
    """Turn residual streams (..., D) into float32 logits (..., V), by the output projection and its bias."""
    logits = F.linear(stream.to(model.device, model.dtype), model.output_weight, model.final_logits_bias[0])
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
