"""Florence2Model: vision tower, projection and language model, joined.

Florence-2 (Xiao et al., CVPR 2024, https://arxiv.org/abs/2311.06242). Parameters only: whatever a call computes
belongs to that call, so one model serves many threads.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.fast.linear import Linear
from florence2.fast.unchanged import may_bypass
from florence2.model.attention import AttentionKind
from florence2.model.bart import Attention, Decoder, DecoderCache, DecoderLayer, LanguageModel, Positions
from florence2.model.config import Florence2Config
from florence2.model.davit import DaViT
from florence2.model.projection import Projection
from florence2.model.trace import Trace, record, scope

IGNORED_LABEL = -100


class Florence2Model(nn.Module):
    """The network, without anything that knows pictures, text or files.

    Module paths are those of transformers' native layout without its leading "model.". The token embedding is one
    tensor, `language_model.shared.weight`, used for prompt, answer and output projection, unless a LoRA adapter has
    given the last a weight of its own, `lm_head.weight`.
    """

    final_logits_bias: Tensor

    def __init__(self, config: Florence2Config, attention: AttentionKind = "sdpa"):
        """Random weights; `checkpoint.load_model` fills in trained ones. `attention` is "sdpa" or "eager"."""
        super().__init__()
        self.config = config
        self.vision_tower = DaViT(config.vision, attention)
        self.multi_modal_projector = Projection(config.vision)
        self.language_model = LanguageModel(config.text, attention)
        self.lm_head: Head | None = None
        self.register_buffer("final_logits_bias", torch.zeros(1, config.text.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return self.multi_modal_projector.image_projection.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.multi_modal_projector.image_projection.weight.device

    @property
    def output_weight(self) -> Tensor:
        """The output projection (V, D)."""
        return self.language_model.shared.weight if self.lm_head is None else self.lm_head.weight

    def encode_image(self, pixel_values: Tensor, trace: Trace | None = None) -> Tensor:
        """Pixels (B, 3, H, W), normalised -> image tokens (B, N, D).

        Any H and W whose grid the position table covers, equal or not; raises ImageError for others.
        """
        self.multi_modal_projector.image_position_embed.check(*self.config.vision.grid_size(*pixel_values.shape[-2:]))
        pixel_values = record(trace, "pixel_values", pixel_values.to(self.device, self.dtype))
        grid = record(trace, "vision_tower", self.vision_tower(pixel_values, scope(trace, "vision_tower")))
        tokens = self.multi_modal_projector(grid, scope(trace, "multi_modal_projector"))
        return record(trace, "multi_modal_projector", tokens)

    def encode(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Image tokens (B, N, D) and prompt ids (B, T) -> memory (B, N + T, D).

        `attention_mask` (B, T) is 1 or True at real ids and 0 at padding, which nothing then attends to; None when
        there is no padding. Rows of a padded batch equal their singles. (The reference attends to the padding.)
        Raises PromptError when N + T is more than the checkpoint's positions.
        """
        # prompt embeddings are never scaled, whatever scale_embedding says: so the reference does it
        image_tokens = record(trace, "image_tokens", image_features)
        embeddings = torch.cat([image_tokens, record(trace, "prompt", self.language_model.shared(input_ids))], dim=1)
        mask = None if attention_mask is None else self.memory_mask(image_features, attention_mask)
        return record(trace, "memory", self.language_model.encoder(embeddings, mask, scope(trace, "encoder")))

    def memory_mask(self, image_features: Tensor, attention_mask: Tensor) -> Tensor:
        """The mask of a memory: (B, N) image tokens, all real, then `attention_mask` (B, T) -> (B, N + T) bool."""
        image = attention_mask.new_ones(image_features.shape[:2], dtype=torch.bool)
        return torch.cat([image, attention_mask.bool()], dim=1)

    def decode(
        self,
        decoder_input_ids: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        trace: Trace | None = None,
    ) -> Tensor:
        """Answer ids so far (B, T) and memory (B, S, D) -> float32 logits (B, T, V) of the ids that follow each.

        Nothing is cached: this is the executable specification of `start_cache` and `step`. Raises PromptError when
        T is more than the checkpoint's positions.
        """
        embeddings = self.language_model.shared(decoder_input_ids)
        mask = None if memory_mask is None else memory_mask.bool()
        hidden = self.language_model.decoder(embeddings, memory, mask, scope(trace, "decoder"))
        return self._logits(hidden, trace)

    def start_cache(
        self,
        memory: Tensor,
        beams: int,
        max_length: int,
        memory_mask: Tensor | None = None,
        trace: Trace | None = None,
    ) -> DecoderCache:
        """The cache of one generation over `memory` (B, S, D): K beams per picture, up to `max_length` positions."""
        mask = None if memory_mask is None else memory_mask.bool()
        return DecoderCache(self.language_model.decoder, memory, beams, max_length, mask, scope(trace, "decoder"))

    def step(self, ids: Tensor, cache: DecoderCache, trace: Trace | None = None) -> Tensor:
        """The newest id of every beam (B·K,) -> float32 logits (B·K, V) of the next; the cache grows by one."""
        embeddings = self.language_model.shared(ids[:, None])
        hidden = self.language_model.decoder.step(embeddings, cache, scope(trace, "decoder"))
        return self._logits(hidden[:, 0], trace)

    def loss(
        self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Mean cross-entropy of `labels` (B, T) under teacher forcing, a scalar.

        `pixel_values` (B, 3, H, W); the rest as in `answer_loss`.
        """
        return self.answer_loss(self.encode_image(pixel_values), input_ids, labels, attention_mask)

    def answer_loss(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        labels: Tensor,
        attention_mask: Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """Cross-entropy of `labels` (B, T) on pictures that are encoded already, a scalar.

        `image_features` (B, N, D); `input_ids` and `attention_mask` (B, S) as in `encode`. Labels of -100 are not
        counted. The decoder reads the labels shifted right behind the start id, with padding in place of -100.
        """
        memory = self.encode(image_features, input_ids, attention_mask)
        mask = None if attention_mask is None else self.memory_mask(image_features, attention_mask)
        return self.memory_loss(memory, labels, mask, reduction)

    def memory_loss(
        self,
        memory: Tensor,
        labels: Tensor,
        memory_mask: Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
    ) -> Tensor:
        """The same from a memory (B, S, D) and its mask (B, S)."""
        text = self.config.text
        shifted = F.pad(labels[:, :-1], (1, 0), value=text.decoder_start_token_id)
        shifted = shifted.masked_fill(shifted == IGNORED_LABEL, text.pad_token_id)
        logits = self.decode(shifted, memory, memory_mask)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction=reduction)

    def _logits(self, hidden: Tensor, trace: Trace | None) -> Tensor:
        logits = F.linear(hidden, self.output_weight, self.final_logits_bias[0])
        return record(trace, "logits", logits.to(torch.promote_types(logits.dtype, torch.float32)))


class Head(nn.Module):
    """The weight of an output projection (V, D) that is not the token embedding."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


_DECODING_PARTS = frozenset((Decoder, DecoderLayer, Attention, Positions, Linear, nn.LayerNorm, nn.ModuleList))


def decodes_as_built(model: Florence2Model) -> bool:
    """Whether `step` may be replaced by a faster way to the same numbers: nothing in it is hooked or changed.

    Not with `attention="eager"` either: whoever asks for that wants the specification.
    """
    text = model.language_model
    if type(model) is not Florence2Model or type(text) is not LanguageModel:
        return False
    if any(part.attention == "eager" for part in text.decoder.modules() if isinstance(part, Attention)):
        return False
    return may_bypass(text.decoder, _DECODING_PARTS) and may_bypass(text.shared, frozenset((nn.Embedding,)))
