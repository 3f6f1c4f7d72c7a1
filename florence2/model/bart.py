"""BART: an encoder over image tokens and prompt, a decoder that writes the answer.

BART (Lewis et al., ACL 2020, https://arxiv.org/abs/1910.13461): post-norm Transformer layers, learned positions with
an offset of 2, exact GELU. Dimensions: B pictures, K beams, T target and S source positions, D model, V vocabulary.

The decoder runs in two ways that share every line but the attention: `forward`, over whole sequences without a cache,
is the specification; `step`, one token per beam over a `DecoderCache`, is what generation uses. (On a CPU `packed.py`
takes the step's place, with the same mathematics over rearranged weights.)
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.errors import PromptError
from florence2.fast.linear import Linear
from florence2.model.attention import AttentionKind, attend
from florence2.model.config import TextConfig
from florence2.model.trace import Trace, record, scope

POSITION_OFFSET = 2  # rows 0 and 1 of the position tables are unused, a leftover of fairseq's padding index

Mix = Callable[["Attention", Tensor], Tensor]
"""How queries meet keys and values: (module, x (B, T, D)) -> mixed values (B, T, D), before `out_proj`."""


class LanguageModel(nn.Module):
    """The two stacks around one shared token embedding, which is also the output projection."""

    def __init__(self, config: TextConfig, attention: AttentionKind = "sdpa"):
        super().__init__()
        # read as an input, padding is a constant that is not learnt, as in the reference
        self.shared = nn.Embedding(config.vocab_size, config.d_model, padding_idx=config.pad_token_id)
        self.encoder = Encoder(config, attention)
        self.decoder = Decoder(config, attention)


class Encoder(nn.Module):
    """(B, S, D) embeddings -> memory (B, S, D)."""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout = config.dropout
        self.embed_positions = Positions(config)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(EncoderLayer(config, attention) for _ in range(config.encoder_layers))

    def forward(self, embeddings: Tensor, mask: Tensor | None = None, trace: Trace | None = None) -> Tensor:
        """`mask` (B, S) bool, True at real positions; None when all are."""
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, S)
        x = embeddings + self.embed_positions(0, embeddings.shape[1])
        x = F.dropout(record(trace, "embedding", self.layernorm_embedding(x)), self.dropout, self.training)
        for i, layer in enumerate(self.layers):
            x = record(trace, f"layers.{i}", layer(x, mask, scope(trace, f"layers.{i}")))
        return x


class Decoder(nn.Module):
    """Token embeddings and memory -> hidden states, with or without a cache."""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout = config.dropout
        self.scale = config.d_model**0.5 if config.scale_embedding else 1.0
        self.embed_positions = Positions(config)
        self.layernorm_embedding = nn.LayerNorm(config.d_model)
        self.layers = nn.ModuleList(DecoderLayer(config, attention) for _ in range(config.decoder_layers))

    def forward(
        self, embeddings: Tensor, memory: Tensor, memory_mask: Tensor | None = None, trace: Trace | None = None
    ) -> Tensor:
        """`embeddings` (B, T, D), `memory` (B, S, D), `memory_mask` (B, S) bool -> (B, T, D)."""
        mask = None if memory_mask is None else memory_mask[:, None, None, :]
        x = self.embed(embeddings, self.embed_positions(0, embeddings.shape[1]), trace)
        for i, layer in enumerate(self.layers):
            inner = scope(trace, f"layers.{i}")
            x = layer(x, _attend_causally(inner), _attend_to(memory, mask, inner), inner)
            x = record(trace, f"layers.{i}", x)
        return x

    def step(self, embeddings: Tensor, cache: "DecoderCache", trace: Trace | None = None) -> Tensor:
        """One token for each of K beams: `embeddings` (B·K, 1, D) -> (B·K, 1, D). The cache grows by one position."""
        x = self.embed(embeddings, cache.embed_position(self.embed_positions), trace)
        cache.advance()
        for i, layer in enumerate(self.layers):
            inner = scope(trace, f"layers.{i}")
            x = layer(x, _attend_past(cache, i, inner), _attend_memory(cache, i, inner), inner)
            x = record(trace, f"layers.{i}", x)
        return x

    def embed(self, embeddings: Tensor, positions: Tensor, trace: Trace | None = None) -> Tensor:
        """Embeddings of tokens (B, T, D) and of their positions (T, D) -> input of the first layer."""
        x = record(trace, "embedding", self.layernorm_embedding(embeddings * self.scale + positions))
        return F.dropout(x, self.dropout, self.training)


class Positions(nn.Embedding):
    """Learned absolute positions: rows `start` to `start + length` of the table, past its unused first two."""

    def __init__(self, config: TextConfig):
        super().__init__(config.max_position_embeddings + POSITION_OFFSET, config.d_model)

    def forward(self, start: int, length: int) -> Tensor:  # type: ignore[override]
        """-> (length, D). Raises PromptError when the positions run past the table."""
        limit = self.num_embeddings - POSITION_OFFSET
        if start + length > limit:
            raise PromptError(
                f"{start + length} positions (image tokens count too) are more than the {limit} of this checkpoint; "
                "shorten the text."
            )
        return self.weight[start + POSITION_OFFSET :][:length]


class Attention(nn.Module):
    """The projections of multi-head attention; who attends to what is the caller's affair."""

    def __init__(self, config: TextConfig, heads: int, attention: AttentionKind):
        super().__init__()
        self.heads, self.attention, self.dropout = heads, attention, config.attention_dropout
        self.k_proj = Linear(config.d_model, config.d_model)
        self.v_proj = Linear(config.d_model, config.d_model)
        self.q_proj = Linear(config.d_model, config.d_model)
        self.out_proj = Linear(config.d_model, config.d_model)

    def queries(self, x: Tensor, trace: Trace | None = None) -> Tensor:
        """(B, T, D) -> (B, heads, T, D / heads)"""
        return record(trace, "queries", self._split(self.q_proj(x)))

    def keys_values(self, x: Tensor, trace: Trace | None = None) -> tuple[Tensor, Tensor]:
        """(B, S, D) -> two of (B, heads, S, D / heads)"""
        keys = record(trace, "keys", self._split(self.k_proj(x)))
        return keys, record(trace, "values", self._split(self.v_proj(x)))

    def mix(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None = None,
        causal: bool = False,
        trace: Trace | None = None,
    ) -> Tensor:
        """Attention over split heads (see `attend`), heads joined again: (B, T, D)."""
        rate = self.dropout if self.training else 0.0
        out = attend(query, key, value, mask, causal=causal, dropout=rate, attention=self.attention, trace=trace)
        return out.transpose(1, 2).flatten(2)

    def _split(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], self.heads, -1).transpose(1, 2)


class EncoderLayer(nn.Module):
    """x = LN(x + self-attention(x)); x = LN(x + MLP(x))"""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.self_attn = Attention(config, config.encoder_attention_heads, attention)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.encoder_ffn_dim)
        self.fc2 = Linear(config.encoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mask: Tensor | None, trace: Trace | None = None) -> Tensor:
        attn, inner = self.self_attn, scope(trace, "self_attention")
        mixed = attn.mix(attn.queries(x, inner), *attn.keys_values(x, inner), mask, trace=inner)
        x = self.self_attn_layer_norm(x + self._drop(record(trace, "self_attention", attn.out_proj(mixed))))
        x = record(trace, "after_self_attention", x)
        hidden = F.dropout(record(trace, "mlp.hidden", F.gelu(self.fc1(x))), self.activation_dropout, self.training)
        out: Tensor = self.final_layer_norm(x + self._drop(record(trace, "mlp", self.fc2(hidden))))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class DecoderLayer(nn.Module):
    """As an encoder layer, with attention to the memory between the two."""

    def __init__(self, config: TextConfig, attention: AttentionKind):
        super().__init__()
        self.dropout, self.activation_dropout = config.dropout, config.activation_dropout
        self.self_attn = Attention(config, config.decoder_attention_heads, attention)
        self.self_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.encoder_attn = Attention(config, config.decoder_attention_heads, attention)
        self.encoder_attn_layer_norm = nn.LayerNorm(config.d_model)
        self.fc1 = Linear(config.d_model, config.decoder_ffn_dim)
        self.fc2 = Linear(config.decoder_ffn_dim, config.d_model)
        self.final_layer_norm = nn.LayerNorm(config.d_model)

    def forward(self, x: Tensor, mix_self: Mix, mix_memory: Mix, trace: Trace | None = None) -> Tensor:
        mixed = self.self_attn.out_proj(mix_self(self.self_attn, x))
        x = self.self_attn_layer_norm(x + self._drop(record(trace, "self_attention", mixed)))
        x = record(trace, "after_self_attention", x)
        mixed = self.encoder_attn.out_proj(mix_memory(self.encoder_attn, x))
        x = self.encoder_attn_layer_norm(x + self._drop(record(trace, "cross_attention", mixed)))
        x = record(trace, "after_cross_attention", x)
        hidden = F.dropout(record(trace, "mlp.hidden", F.gelu(self.fc1(x))), self.activation_dropout, self.training)
        out: Tensor = self.final_layer_norm(x + self._drop(record(trace, "mlp", self.fc2(hidden))))
        return out

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def _attend_causally(trace: Trace | None) -> Mix:
    trace = scope(trace, "self_attention")
    return lambda attn, x: attn.mix(attn.queries(x, trace), *attn.keys_values(x, trace), causal=True, trace=trace)


def _attend_to(memory: Tensor, mask: Tensor | None, trace: Trace | None) -> Mix:
    trace = scope(trace, "cross_attention")
    return lambda attn, x: attn.mix(attn.queries(x, trace), *attn.keys_values(memory, trace), mask, trace=trace)


def _attend_past(cache: "DecoderCache", layer: int, trace: Trace | None) -> Mix:
    trace = scope(trace, "self_attention")

    def mix(attn: Attention, x: Tensor) -> Tensor:
        rows = cache.beams_as_queries(x)
        keys, values, mask = cache.extend(layer, *attn.keys_values(rows, trace))
        return attn.mix(attn.queries(rows, trace), keys, values, mask, trace=trace).view_as(x)

    return mix


def _attend_memory(cache: "DecoderCache", layer: int, trace: Trace | None) -> Mix:
    trace = scope(trace, "cross_attention")

    def mix(attn: Attention, x: Tensor) -> Tensor:
        queries = attn.queries(cache.beams_as_queries(x), trace)
        return attn.mix(queries, *cache.memory[layer], cache.memory_mask, trace=trace).view_as(x)

    return mix


class DecoderCache:
    """The keys and values of one generation, a value that its call owns.

    Memory keys and values are computed once per picture and seen by its K beams as K queries. Own keys and values
    are written once, at slot `position · K + beam`, and never moved: when beams are reordered only `ancestry`
    changes, the mask that says which slots lie on a beam's past. So a reorder costs a few bytes, and a step reads
    the K·t slots once for all beams.
    """

    def __init__(
        self,
        decoder: Decoder,
        memory: Tensor,
        beams: int,
        max_length: int,
        memory_mask: Tensor | None = None,
        trace: Trace | None = None,
    ):
        """`memory` (B, S, D), `memory_mask` (B, S) bool; room for `max_length` positions of `beams` beams each."""
        B, _, D = memory.shape
        self.beams, self.length = beams, 0
        self.memory_mask = None if memory_mask is None else memory_mask[:, None, None, :]  # (B, 1, 1, S)
        layers = [layer for layer in decoder.layers if isinstance(layer, DecoderLayer)]
        inner = [scope(trace, f"layers.{i}.cross_attention") for i in range(len(layers))]
        self.memory = [  # each (B, heads, S, d)
            layer.encoder_attn.keys_values(memory, inner[i]) for i, layer in enumerate(layers)
        ]
        heads = layers[0].self_attn.heads
        shape = (B, heads, max_length * beams, D // heads)
        self.own = [(memory.new_empty(shape), memory.new_empty(shape)) for _ in layers]
        self.ancestry = torch.zeros(B, beams, max_length * beams, dtype=torch.bool, device=memory.device)

    def reorder(self, parents: Tensor) -> None:
        """Let beam k continue beam `parents[b, k]`: (B, K) long."""
        if self.beams > 1:
            self.ancestry = self.ancestry.gather(1, parents[:, :, None].expand_as(self.ancestry))

    def embed_position(self, table: Positions) -> Tensor:
        """The embedding (1, D) of the position that `advance` opens next."""
        embedding: Tensor = table(self.length, 1)
        return embedding

    def keep(self, rows: Tensor) -> None:
        """Only the pictures `rows` (B',) go on."""
        end = self.length * self.beams
        self.memory = [(keys[rows], values[rows]) for keys, values in self.memory]
        self.memory_mask = None if self.memory_mask is None else self.memory_mask[rows]
        self.ancestry = self.ancestry[rows]
        for layer, pair in enumerate(self.own):
            smaller = [values.new_empty(len(rows), *values.shape[1:]) for values in pair]
            for new, old in zip(smaller, pair, strict=True):
                new[:, :, :end] = old[rows, :, :end]  # not what nobody has written yet
            self.own[layer] = (smaller[0], smaller[1])

    def advance(self) -> None:
        """Open the next position; each beam's own slot there becomes part of its past."""
        start = self.length * self.beams
        self.ancestry[:, :, start : start + self.beams] = torch.eye(
            self.beams, dtype=torch.bool, device=self.ancestry.device
        )
        self.length += 1

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write the newest position of `layer`; return what its queries may look at.

        `keys` and `values` (B, heads, K, d) -> all so far, (B, heads, slots, d) each, and the mask (B, 1, K, slots),
        None for a single beam.
        """
        all_keys, all_values = self.own[layer]
        end = self.length * self.beams
        all_keys[:, :, end - self.beams : end] = keys
        all_values[:, :, end - self.beams : end] = values
        mask = None if self.beams == 1 else self.ancestry[:, None, :, :end]
        return all_keys[:, :, :end], all_values[:, :, :end], mask

    def beams_as_queries(self, x: Tensor) -> Tensor:
        """One row per beam -> the K beams of a picture side by side: (B·K, 1, D) -> (B, K, D)."""
        return x.view(-1, self.beams, x.shape[-1])
