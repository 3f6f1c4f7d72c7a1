"""Florence2Model: vision tower, projection and language model, joined.

Florence-2 (Xiao et al., CVPR 2024, https://arxiv.org/abs/2311.06242). Modules hold parameters only: whatever a call
computes belongs to that call, so one model serves many threads.
"""

from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from florence2.model.attention import AttentionKind
from florence2.model.bart import LanguageModel
from florence2.model.cache import DecoderCache
from florence2.model.config import Florence2Config
from florence2.model.davit import DaViT
from florence2.model.projection import Projection
from florence2.model.trace import NO_TRACE, Trace

IGNORED_LABEL = -100


class Florence2Model(nn.Module):
    """The network, without anything that knows images, text or files.

    Module paths are those of transformers' native layout without its leading "model.". One token embedding,
    `language_model.shared.weight`, serves prompt, answer and output projection. A fine-tune may have given the output
    projection a weight of its own, `lm_head.weight`, and the tokens of answers an embedding of their own,
    `language_model.decoder.embed_tokens.weight`.
    """

    final_logits_bias: Tensor

    def __init__(self, config: Florence2Config, attention: AttentionKind = "sdpa"):
        """Build the model with random weights; `checkpoint.load_model` fills in trained ones.

        Args:
            config: the shape.
            attention: "sdpa" for torch's fused kernel, "eager" for attention written out.
        """
        super().__init__()
        self.config = config
        self.vision_tower = DaViT(config.vision, attention)
        self.multi_modal_projector = Projection(config.vision)
        self.language_model = LanguageModel(config.text, attention)
        self.lm_head: Head | None = None
        if config.text.untied_head:
            self.lm_head = Head(torch.empty(config.text.vocab_size, config.text.d_model))
            nn.init.normal_(self.lm_head.weight)
        self.register_buffer("final_logits_bias", torch.zeros(1, config.text.vocab_size))

    @property
    def dtype(self) -> torch.dtype:
        """The type of the parameters."""
        return next(self.multi_modal_projector.parameters()).dtype

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(self.multi_modal_projector.parameters()).device

    @property
    def output_weight(self) -> Tensor:
        """The output projection (V, D)."""
        return self.language_model.shared.weight if self.lm_head is None else self.lm_head.weight

    def untie_head(self, weight: Tensor | None = None) -> None:
        """Give the output projection a weight (V, D) of its own; None is a copy of the one that it has."""
        weight = self.output_weight.detach().clone() if weight is None else weight
        self.lm_head = Head(weight).train(self.training)
        self.config = replace(self.config, text=replace(self.config.text, untied_head=True))

    def untie_answers(self, weight: Tensor | None = None) -> None:
        """Give the tokens of answers an embedding (V, D) of their own; None is a copy of the shared one."""
        shared = self.language_model.shared
        weight = shared.weight.detach().clone() if weight is None else weight
        own = nn.Embedding(len(weight), weight.shape[1], padding_idx=shared.padding_idx, _weight=weight)
        self.language_model.decoder.embed_tokens = own.train(shared.training)
        self.config = replace(self.config, text=replace(self.config.text, untied_answers=True))

    def forward(
        self,
        pixel_values: Tensor,
        input_ids: Tensor,
        decoder_input_ids: Tensor,
        attention_mask: Tensor | None = None,
        trace: Trace = NO_TRACE,
    ) -> Tensor:
        """Run the whole network under teacher forcing.

        Args:
            pixel_values: (B, 3, H, W), normalised.
            input_ids: prompt ids (B, S).
            decoder_input_ids: answer ids (B, T), the start id first.
            attention_mask: (B, S), 1 or True at real prompt ids.
            trace: sees the intermediates.

        Returns:
            float32 logits (B, T, V) of the id that follows each answer id.
        """
        image_features = self.encode_image(pixel_values, trace)
        memory = self.encode(image_features, input_ids, attention_mask, trace)
        mask = None if attention_mask is None else self.memory_mask(image_features, attention_mask)
        return self.decode(decoder_input_ids, memory, mask, trace)

    def encode_image(self, pixel_values: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Encode an image: pixels (B, 3, H, W), normalised -> image tokens (B, N, D).

        H and W may differ. Raises ImageError where their grid is larger than the position table.
        """
        self.multi_modal_projector.image_position_embed.check(*self.config.vision.grid_size(*pixel_values.shape[-2:]))
        pixel_values = trace("pixel_values", pixel_values.to(self.device, self.dtype))
        grid = trace("vision_tower", self.vision_tower(pixel_values, trace.at("vision_tower")))  # (B, h, w, C)
        tokens = self.multi_modal_projector(grid, trace.at("multi_modal_projector"))  # (B, N, D)
        return trace("multi_modal_projector", tokens)

    def encode(
        self,
        image_features: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        trace: Trace = NO_TRACE,
    ) -> Tensor:
        """Encode image tokens (B, N, D) and prompt ids (B, S) together -> memory (B, N + S, D).

        `attention_mask` (B, S) is 1 or True at real ids and 0 at padding, which no position attends to; None when
        there is no padding. Rows of a padded batch equal their singles. (The reference attends to the padding.)
        Raises PromptError when N + S is more than the checkpoint's positions.
        """
        image_tokens = trace("image_tokens", image_features)
        # as in the reference, prompt embeddings are never scaled, whatever scale_embedding says
        prompt = trace("prompt", self.language_model.shared(input_ids))
        mask = None if attention_mask is None else self.memory_mask(image_features, attention_mask)
        embeddings = torch.cat([image_tokens, prompt], dim=1)  # (B, N + S, D)
        return trace("memory", self.language_model.encoder(embeddings, mask, trace.at("encoder")))

    def memory_mask(self, image_features: Tensor, attention_mask: Tensor) -> Tensor:
        """Extend a prompt's mask (B, S) by the image tokens (B, N, D), all real -> (B, N + S) bool."""
        image = attention_mask.new_ones(image_features.shape[:2], dtype=torch.bool)
        return torch.cat([image, attention_mask.bool()], dim=1)

    def decode(
        self, decoder_input_ids: Tensor, memory: Tensor, memory_mask: Tensor | None = None, trace: Trace = NO_TRACE
    ) -> Tensor:
        """Decode answer ids (B, T) over memory (B, N + S, D) -> float32 logits (B, T, V) of the ids that follow.

        Nothing is cached: this is the executable specification of `start_cache` and `step`. Raises PromptError when
        T is more than the checkpoint's positions.
        """
        embeddings = self.language_model.embed_answer(decoder_input_ids)  # (B, T, D)
        mask = None if memory_mask is None else memory_mask.bool()
        return self.logits(self.language_model.decoder(embeddings, memory, mask, trace.at("decoder")), trace)

    def start_cache(
        self,
        memory: Tensor,
        beams: int,
        max_length: int,
        memory_mask: Tensor | None = None,
        trace: Trace = NO_TRACE,
    ) -> DecoderCache:
        """Start one generation over `memory` (B, N + S, D): K beams an image, at most `max_length` positions."""
        mask = None if memory_mask is None else memory_mask.bool()
        return DecoderCache(self.language_model.decoder, memory, beams, max_length, mask, trace.at("decoder"))

    def step(self, ids: Tensor, cache: DecoderCache, trace: Trace = NO_TRACE) -> Tensor:
        """Decode the newest id of every beam (B·K,) -> float32 logits (B·K, V) of the next; the cache grows by one."""
        embeddings = self.language_model.embed_answer(ids[:, None])  # (B·K, 1, D)
        hidden = self.language_model.decoder.step(embeddings, cache, trace.at("decoder"))
        return self.logits(hidden[:, 0], trace)

    def logits(self, hidden: Tensor, trace: Trace = NO_TRACE) -> Tensor:
        """Project hidden states (..., D) to float32 logits (..., V)."""
        logits = F.linear(hidden, self.output_weight, self.final_logits_bias[0])
        return trace("logits", logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def loss(
        self, pixel_values: Tensor, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None
    ) -> Tensor:
        """Return the mean cross-entropy of `labels` (B, T) under teacher forcing, a scalar.

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
        """Return the cross-entropy of `labels` (B, T) on images that are already encoded, a scalar.

        `image_features` (B, N, D); `input_ids` and `attention_mask` (B, S) as in `encode`. Labels of -100 are not
        counted. The decoder reads the labels shifted right after the start id, with padding in place of -100.
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
        """Return the same from a memory (B, N + S, D) and its mask (B, N + S)."""
        text = self.config.text
        shifted = F.pad(labels[:, :-1], (1, 0), value=text.decoder_start_token_id)
        shifted = shifted.masked_fill(shifted == IGNORED_LABEL, text.pad_token_id)
        logits = self.decode(shifted, memory, memory_mask)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL, reduction=reduction)


class Head(nn.Module):
    """The weight of an output projection (V, D) that is not the token embedding."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)
