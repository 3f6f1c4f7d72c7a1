"""Attention rollout: how much each token of an answer took from each input of the encoder, through all layers.

Attention rollout (Abnar & Zuidema, ACL 2020, https://arxiv.org/abs/2005.00928) treats a layer as half residual stream
and half attention, averaged over its heads: A' = (A + I) / 2. A stack is the product of its layers. The paper covers
encoders; here a token of the answer passes the decoder's layers in the same way: each layer halves what the token has
and adds half of what its cross-attention takes from the memory. The token's own embedding, and what it took from
earlier tokens of the answer, are left out.
"""

import torch
from torch import Tensor

from florence2.inspect.attention import AttentionMaps, split_memory
from florence2.tracing.runs import Run


def attention_rollout(run: Run, alternative: int = 0) -> AttentionMaps:
    """Return the attention rollout of each token of an answer, over the inputs of the encoder.

    Args:
        run: A run whose trace kept "encoder.layers.*.self_attention.weights" and
            "decoder.layers.*.cross_attention.weights".
        alternative: As in `run.answer_ids`.

    Returns:
        Maps of (T, ...).

    Raises:
        OptionError: The weights were not kept, or the run has no such alternative.
    """
    return split_memory(decoder_rollout(run, alternative) @ encoder_rollout(run), run)


def encoder_rollout(run: Run) -> Tensor:
    """Return (S, S): the share of each encoder input in each position of the memory; rows sum to 1."""
    rollout: Tensor | None = None
    for i in range(run.selection.config.text.encoder_layers):
        weights = run[f"encoder.layers.{i}.self_attention.weights"].float().mean(dim=0)  # (S, S)
        layer = (weights + torch.eye(len(weights), device=weights.device)) / 2
        rollout = layer if rollout is None else layer @ rollout
    assert rollout is not None, "an encoder has layers"
    return rollout


def decoder_rollout(run: Run, alternative: int = 0) -> Tensor:
    """Return (T, S): the share of each position of the memory in what each token took from it; rows sum to 1."""
    taken = torch.zeros(())
    for i in range(run.selection.config.text.decoder_layers):
        weights = run.along_answer(f"decoder.layers.{i}.cross_attention.weights", alternative)  # (T, heads, S)
        taken = (weights.float().mean(dim=1) + taken.to(weights.device)) / 2
    return taken / taken.sum(dim=-1, keepdim=True)
