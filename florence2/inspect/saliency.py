"""Gradient x input: the pixels and the words of the prompt on which a token of the answer depends.

The gradient of a token's log-probability by each input, times that input (Simonyan et al., 2014,
https://arxiv.org/abs/1312.6034; Shrikumar et al., 2016, https://arxiv.org/abs/1605.01713): to first order, the
fall of the log-probability if the input went to zero. For a pixel, zero is the mean colour, since pixels are
normalised; for a word it is the zero vector. Signs are kept: negative values speak against the token.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from florence2.errors import OptionError, plain
from florence2.model.florence2 import Florence2Model
from florence2.model.trace import Trace
from florence2.tracing.runs import Run


@dataclass(frozen=True, eq=False)
class Saliency:
    """Gradient x input of the log-probabilities of n tokens of an answer.

    Attributes:
        tokens: The numbers of the tokens, from 0.
        log_probabilities: (n,), before any rule of the search.
        image: (n, H, W), for each pixel of `pixel_values`, summed over its channels.
        prompt: (n, P), for each id of the prompt.
    """

    tokens: tuple[int, ...]
    log_probabilities: Tensor
    image: Tensor
    prompt: Tensor

    def by_cell(self, grid: tuple[int, int]) -> Tensor:
        """Sum `image` over the cells of a grid.

        Args:
            grid: (rows, columns), which cut the image into equal parts.

        Returns:
            (n, rows, columns).
        """
        (h, w), (n, H, W) = grid, self.image.shape
        rows = torch.arange(H, device=self.image.device) * h // H
        columns = torch.arange(W, device=self.image.device) * w // W
        cells = (rows[:, None] * w + columns).flatten()  # (H·W,)
        return self.image.new_zeros(n, h * w).index_add_(1, cells, self.image.flatten(1)).view(n, h, w)


def input_saliency(
    model: Florence2Model, run: Run, tokens: Sequence[int] | None = None, alternative: int = 0
) -> Saliency:
    """Compute gradient x input for tokens of an answer, with one backward pass for each.

    Args:
        model: The model of the run, `f.model`.
        run: A run whose trace kept "pixel_values". If it also kept the stream of the last decoder layer, a run with
            patches is recognised and refused.
        tokens: The numbers of the tokens, from 0; all by default.
        alternative: As in `run.answer_ids`.

    Returns:
        The saliency of these tokens.

    Raises:
        OptionError: The answer does not have such a token, the pixels were not kept, or the run had patches, which
            saliency cannot follow.
    """
    answer = run.answer_ids(alternative)
    chosen, last = choose_tokens(tokens, len(answer)), f"decoder.layers.{model.config.text.decoder_layers - 1}"
    forward = _Forward(model, run["pixel_values"][None], run.prompt_ids, answer)
    if last in run.names:
        _check_same(forward.stream, run.along_answer(last, alternative))
    return forward.differentiate(chosen)


def saliency_of(
    model: Florence2Model,
    pixel_values: Tensor,
    prompt_ids: Sequence[int],
    answer_ids: Sequence[int],
    tokens: Sequence[int] | None = None,
) -> Saliency:
    """Compute it for any image `pixel_values` (1, 3, H, W), prompt and answer; `answer_ids` without the start id."""
    return _Forward(model, pixel_values, prompt_ids, answer_ids).differentiate(choose_tokens(tokens, len(answer_ids)))


def choose_tokens(tokens: Sequence[int] | None, length: int) -> tuple[int, ...]:
    """Return the numbers of the chosen tokens of an answer of `length`. Raises OptionError for any it does not have."""
    if not isinstance(tokens, Iterable | None):
        raise OptionError(f"tokens is {tokens!r}; it must be several token numbers, as [3].")
    chosen = tuple(range(length)) if tokens is None else tuple(map(plain, tokens))
    wrong = [token for token in chosen if type(token) is not int or not 0 <= token < length]
    if wrong:
        raise OptionError(
            f"The answer has no token {wrong[0]!r}; its {length} tokens, the end included, are 0 to {length - 1}."
        )
    return chosen


class _Forward(Trace):
    """The answer read under teacher forcing, with gradients to the pixels and to the prompt's embeddings.

    It is also the trace of its own run, where it replaces the prompt's embeddings by a leaf of the graph.
    """

    def __init__(
        self, model: Florence2Model, pixel_values: Tensor, prompt_ids: Sequence[int], answer_ids: Sequence[int]
    ):
        self._last = f"decoder.layers.{model.config.text.decoder_layers - 1}"
        with torch.inference_mode(False), torch.enable_grad():
            ids = torch.tensor([[model.config.text.decoder_start_token_id, *answer_ids]], device=model.device)
            self.pixels = pixel_values.to(model.device, model.dtype, copy=True).requires_grad_()
            features = model.encode_image(self.pixels)
            memory = model.encode(features, torch.tensor([prompt_ids], device=model.device), trace=self)
            logits = model.decode(ids[:, :-1], memory, trace=self)[0]  # (T, V)
            self.log_probabilities = logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]  # (T,)

    def differentiate(self, tokens: Sequence[int]) -> Saliency:
        """Return the saliency of these tokens, with one backward pass for each."""
        inputs, images, prompts = (self.pixels, self.prompt), [], []
        dtype = self.log_probabilities.dtype  # at least float32
        for token in tokens:
            with torch.inference_mode(False), torch.enable_grad():
                gradients = torch.autograd.grad(self.log_probabilities[token], inputs, retain_graph=True)
            image, prompt = (g.to(dtype) * x.detach() for g, x in zip(gradients, inputs, strict=True))
            images.append(image[0].sum(dim=0))  # (H, W)
            prompts.append(prompt[0].sum(dim=-1))  # (P,)
        empty = self.pixels.new_zeros(0, *self.pixels.shape[2:]), self.prompt.new_zeros(0, self.prompt.shape[1])
        return Saliency(
            tokens=tuple(tokens),
            log_probabilities=self.log_probabilities.detach()[list(tokens)],
            image=torch.stack(images) if images else empty[0],
            prompt=torch.stack(prompts) if prompts else empty[1],
        )

    def wants(self, name: str) -> bool:  # noqa: ARG002
        return False

    def enters(self, prefix: str) -> bool:
        return self._last.startswith(f"{prefix}.")

    def __call__(self, name: str, value: Tensor) -> Tensor:
        if name == "prompt":
            value = self.prompt = value.detach().requires_grad_()
        if name == self._last:
            self.stream = value.detach()[0]  # (T, D)
        return value


def _check_same(computed: Tensor, traced: Tensor) -> None:
    """Raise OptionError when the forward pass to differentiate is not the run that was traced."""
    most = 0.05 if computed.dtype in (torch.float16, torch.bfloat16) else 1e-3
    difference = float((computed - traced).float().norm() / traced.float().norm())
    if difference > most:
        raise OptionError(
            f"The model does not reproduce this run: its last layer differs by {difference:.2g} of its norm. Saliency "
            "needs the model without patches; compute it outside of f.patched, or leave it out."
        )
