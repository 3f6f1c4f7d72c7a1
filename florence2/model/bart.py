"""BART: an encoder over image tokens and prompt, a decoder that writes the answer.

BART (Lewis et al., ACL 2020, https://arxiv.org/abs/1910.13461): post-norm Transformer layers, learned positions with
an offset of 2, GELU. Dimensions: B images, K beams, T target and S source positions, D model, V vocabulary.

The decoder runs in two ways that differ only in what a layer attends to: `forward`, over whole sequences without a
cache, is the specification; `step`, one token per beam over a `DecoderCache`, is what generation uses.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from florence2.model.attention import ACTIVATIONS, Activation, AttentionKind, attend
from florence2.model.cache import DecoderCache, Itself, KeySource, Whole
from florence2.model.config import TextConfig, check_positions
from florence2.model.trace import NO_TRACE, Trace

POSITION_OFFSET = 2  # rows 0 and 1 of the position tables are unused, a leftover of fairseq's padding index


class LanguageModel(nn.Module):
    """The two stacks around one shared token embedding, which is also the output projection.

    Some fine-tunes give the tokens of answers an embedding of their own, `decoder.embed_tokens`.
    """

    def __init__(self, config: TextConfig, attention: AttentionKind = "sdpa"):
        super().__init__()
        # the reference never trains the padding row: as an input, padding is a constant
        self.shared = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.encoder = Encoder(config, attention)
        self.decoder = Decoder(config, attention)

    def embed_answer(self, ids: Tensor) -> Tensor:
        """Look up the tokens of answers: ids (B, T) -> (B, T, D)."""
        own = self.decoder.embed_tokens
        embeddings: Tensor = self.shared(ids) if own is None else own(ids)
        return embeddings


class Encoder(nn.Module):
    """(B, S, D) embeddings -> memory (B, S, D)."""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout = config.dropout
        self.embed_positions = Positions(config)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(EncoderLayer(config, attention) for _ in range(config.encoder_layers))

    def forward(self, embeddings: Tensor, mask: Tensor | None = None, trace: Trace = NO_TRACE) -> Tensor:
        """Encode; `mask` (B, S) bool is True at real positions, None when all are."""
        # image tokens and prompt are one sequence to the encoder, so positions run through both
        x = embeddings + self.embed_positions(0, embeddings.shape[1])  # (B, S, D)
        # BART normalises the sum of both embeddings; the original Transformer does not
        x = F.dropout(trace("embedding", self.layernorm_embedding(x)), self.dropout, self.training)
        source = Itself(None if mask is None else mask[:, None, None, :])  # (B, 1, 1, S)
        for i, layer in enumerate(self.layers):
            x = trace(f"layers.{i}", layer(x, source, trace.at(f"layers.{i}")))
        return x


class Decoder(nn.Module):
    """Token embeddings and memory -> hidden states, with or without a cache."""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout = config.dropout
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0  # the reference scales nothing but answers
        self.embed_tokens = (
            nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
            if config.untied_answers
            else None
        )
        self.embed_positions = Positions(config)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config, attention) for _ in range(config.decoder_layers))

    def forward(
        self, embeddings: Tensor, memory: Tensor, memory_mask: Tensor | None = None, trace: Trace = NO_TRACE
    ) -> Tensor:
        """Decode whole sequences: (B, T, D), `memory` (B, S, D), `memory_mask` (B, S) bool -> (B, T, D)."""
        x = self.embed(embeddings, self.embed_positions(0, embeddings.shape[1]), trace)
        past = Itself(causal=True)  # no token may look at those after it
        source = Whole(memory, None if memory_mask is None else memory_mask[:, None, None, :])
        for i, layer in enumerate(self.layers):
            x = trace(f"layers.{i}", layer(x, past, source, trace.at(f"layers.{i}")))
        return x

    def step(self, embeddings: Tensor, cache: DecoderCache, trace: Trace = NO_TRACE) -> Tensor:
        """Decode one token of each of K beams, (B·K, 1, D) -> (B·K, 1, D); the cache grows by one position."""
        x = self.embed(embeddings, cache.embed_position(self.embed_positions), trace)
        cache.advance()  # before the layers, which all write their keys and values at the new position
        for i, layer in enumerate(self.layers):
            x = trace(f"layers.{i}", layer(x, cache.past(i), cache.memory(i), trace.at(f"layers.{i}")))
        return x

    def embed(self, embeddings: Tensor, positions: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Add embeddings of tokens (B, T, D) and of their positions (T, D): the input of the first layer."""
        x = trace("embedding", self.layernorm_embedding(embeddings * self.scale + positions))
        return F.dropout(x, self.dropout, self.training)


class Positions(nn.Embedding):
    """Learned absolute positions: rows `start` to `start + length` of the table, after its unused first two."""

    def __init__(self, config: TextConfig):
        super().__init__(config.max_position_embeddings + POSITION_OFFSET, config.d_model)

    def forward(self, start: int, length: int) -> Tensor:  # type: ignore[override]
        """Return (length, D). Raises PromptError when the positions run past the table."""
        check_positions(start + length, self.num_embeddings - POSITION_OFFSET)
        return self.weight[start + POSITION_OFFSET :][:length]


class Attention(nn.Module):
    """Multi-head attention: query, key, value and output projections. The caller chooses the source of the keys."""

    def __init__(self, config: TextConfig, heads: int, attention: AttentionKind):
        super().__init__()
        self.heads, self.attention, self.dropout = heads, attention, config.attention_dropout
        # in the order of the reference's parameters, which optimisers and checkpoints follow
        self.k_proj = nn.Linear(config.d_model, config.d_model)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x: Tensor, source: KeySource, trace: Trace = NO_TRACE) -> Tensor:
        """Attend from `x` (B, T, D) to `source` -> (B, T, D)."""
        queries = source.as_queries(x)  # (B, T, D): in a step, the K beams of an image stand for its T positions
        query = trace("queries", self._split(self.q_proj(queries)))  # (B, heads, T, d)
        keys, values, mask, causal = source.keys_values(self, queries, trace)
        rate = self.dropout if self.training else 0.0  # of the attention weights; the layer drops the output as well
        mixed = attend(
            query, keys, values, mask, causal=causal, dropout=rate, attention=self.attention, trace=trace
        )  # (B, heads, T, d)
        out: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(2))  # (B, T, D)
        return out.reshape(x.shape)

    def keys_values(self, x: Tensor, trace: Trace = NO_TRACE) -> tuple[Tensor, Tensor]:
        """Project (B, S, D) to keys and values, (B, heads, S, d) each."""
        keys = trace("keys", self._split(self.k_proj(x)))
        return keys, trace("values", self._split(self.v_proj(x)))

    def _split(self, x: Tensor) -> Tensor:
        """(B, T, heads·d) -> (B, heads, T, d)"""
        # the width of a head follows from the weights, so that heads may be pruned
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class _Layer(nn.Module):
    """The steps of a layer: each adds something to x and normalises the sum (post-norm)."""

    dropout: float
    activation_dropout: float
    activation: Activation
    self_attn: Attention
    self_attn_layer_norm: nn.LayerNorm
    fc1: nn.Linear
    fc2: nn.Linear
    final_layer_norm: nn.LayerNorm

    def add_self_attention(self, x: Tensor, source: KeySource, trace: Trace) -> Tensor:
        """x = LN(x + self-attention(x))"""
        added = trace("self_attention", self.self_attn(x, source, trace.at("self_attention")))
        # post-norm: the residual stream itself is normalised, unlike in the vision tower
        return trace("after_self_attention", self.self_attn_layer_norm(x + self.drop(added)))

    def add_mlp(self, x: Tensor, trace: Trace) -> Tensor:
        """x = LN(x + MLP(x))"""
        # before and after the activation have names, so that a patch can replace the activation itself
        hidden = trace("mlp.hidden", self.activation(trace("mlp.before", self.fc1(x))))
        added = trace("mlp", self.fc2(F.dropout(hidden, self.activation_dropout, self.training)))
        out: Tensor = self.final_layer_norm(x + self.drop(added))
        return out

    def drop(self, x: Tensor) -> Tensor:
        """Apply dropout in training."""
        return F.dropout(x, self.dropout, self.training)


class EncoderLayer(_Layer):
    """Self-attention, then the MLP: (B, S, D) -> (B, S, D)."""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = Attention(config, config.encoder_attention_heads, attention)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, source: KeySource, trace: Trace = NO_TRACE) -> Tensor:
        return self.add_mlp(self.add_self_attention(x, source, trace), trace)


class DecoderLayer(_Layer):
    """Self-attention to the answer so far, cross-attention to the memory, then the MLP: (B, T, D) -> (B, T, D)."""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.activation = ACTIVATIONS[config.activation_function]
        self.self_attn = Attention(config, config.decoder_attention_heads, attention)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(config, config.decoder_attention_heads, attention)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = nn.Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, past: KeySource, memory: KeySource, trace: Trace = NO_TRACE) -> Tensor:
        x = self.add_self_attention(x, past, trace)
        # the only place where the answer sees the image and the prompt
        added = trace("cross_attention", self.encoder_attn(x, memory, trace.at("cross_attention")))
        x = trace("after_cross_attention", self.encoder_attn_layer_norm(x + self.drop(added)))
        return self.add_mlp(x, trace)
