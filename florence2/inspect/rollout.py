"""Attention rollout: from which inputs of the encoder the tokens of an answer took something, through all layers.

Attention rollout (Abnar & Zuidema, ACL 2020, https://arxiv.org/abs/2005.00928) takes a layer for half residual stream
and half what its attention, the mean of its heads, brings together: A' = (A + I) / 2, and a stack for the product of
its layers. The paper has encoders alone; here a token of the answer goes through the decoder's layers in the same
way, each halving what the token has and adding half of what its cross-attention brings from the memory. What the
token is by itself is then left out, and so is what it took from earlier tokens of the answer.
"""

import torch
from torch import Tensor

from florence2.inspect.attention_maps import AttentionMaps, split_memory
from florence2.tracing.runs import Run


def roll_out(run: Run, alternative: int = 0) -> AttentionMaps:
    """The rollout of each token of an answer, (T, ...) long, over what the encoder was given.

    The trace must have kept "encoder.layers.*.self_attention.weights" and "decoder.layers.*.cross_attention.weights";
    `alternative` as in `run.answer_ids`.
    """
    return split_memory(roll_out_decoder(run, alternative) @ roll_out_encoder(run), run)


def roll_out_encoder(run: Run) -> Tensor:
    """(S, S): how much of each position of the memory comes from each of the encoder's inputs; rows sum to 1."""
    found: Tensor | None = None
    for i in range(run.tracing.config.text.encoder_layers):
        weights = run[f"encoder.layers.{i}.self_attention.weights"].float().mean(dim=0)  # (S, S)
        layer = (weights + torch.eye(len(weights), device=weights.device)) / 2
        found = layer if found is None else layer @ found
    assert found is not None, "an encoder has layers"
    return found


def roll_out_decoder(run: Run, alternative: int = 0) -> Tensor:
    """(T, S): how much of what each token took from the memory came from each of its positions; rows sum to 1."""
    layers = range(run.tracing.config.text.decoder_layers)
    taken = torch.zeros(())
    for i in layers:
        weights = run.along_answer(f"decoder.layers.{i}.cross_attention.weights", alternative)  # (T, heads, S)
        taken = (weights.float().mean(dim=1) + taken.to(weights.device)) / 2
    return taken / taken.sum(dim=-1, keepdim=True)
