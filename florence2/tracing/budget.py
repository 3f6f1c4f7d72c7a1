"""Predict how many bytes a trace will keep, before anything is computed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.model.config import Florence2Config
from florence2.tracing.names import RULES, Name, image_letters

DEFAULT_LIMIT = 2 << 30
_BYTES = {"int64": 8, "bool": 1}


@dataclass(frozen=True)
class AnswerSizes:
    """The sizes of one batch of answers: B prompts of N image tokens and up to P ids each."""

    batch: int
    image_tokens: int
    prompt: int
    options: GenerationOptions

    def letters(self) -> dict[str, int]:
        """Return the size of each letter in the shapes."""
        B, K, N, P = self.batch, self.options.width, self.image_tokens, self.prompt
        candidates = 2 * K if self.options.num_beams > 1 else K
        return {"B": B, "K": K, "N": N, "P": P, "S": N + P, "candidates": candidates}


def image_bytes(
    names: Iterable[Name], config: Florence2Config, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """Predict the bytes of `names` for pixel values of `shape` (B, 3, H, W)."""
    return sum(
        _count(name, image_letters(config.vision, shape, name.stage)) * _item(name, dtype)
        for name in names
        if name.when == "image"
    )


def answer_bytes(
    names: Iterable[Name], config: Florence2Config, sizes: AnswerSizes, dtype: torch.dtype = torch.float32
) -> int:
    """Predict the bytes of `names` for answers of maximum length, without the banned ids (a few per step)."""
    steps = min(sizes.options.max_new_tokens, config.text.max_position_embeddings)
    letters = sizes.letters()
    return sum(_through_answer(name, letters, steps) * _item(name, dtype) for name in _kept(names, sizes.options))


def check_fits(predicted: int, held: int, limit: int, subject: str, remedy: str) -> None:
    """Raise OptionError when `predicted` bytes in addition to the `held` ones would exceed the limit."""
    if held + predicted > limit:
        already = f" in addition to the {_megabytes(held)} already held" if held else ""
        raise OptionError(
            f"The trace of {subject} may take {_megabytes(predicted)}{already}, more than the limit of "
            f"{_megabytes(limit)}; {remedy}name fewer values, or set a higher `limit` (in bytes)."
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def longest_answer(
    names: Sequence[Name], config: Florence2Config, sizes: AnswerSizes, dtype: torch.dtype, room: int
) -> int:
    """Return the largest `max_new_tokens` whose trace fits into `room` bytes, or 0."""
    low, high = 0, sizes.options.max_new_tokens
    while low < high:
        middle = (low + high + 1) // 2
        tried = AnswerSizes(sizes.batch, sizes.image_tokens, sizes.prompt, sizes.options.changed(max_new_tokens=middle))
        low, high = (middle, high) if answer_bytes(names, config, tried, dtype) <= room else (low, middle - 1)
    return low


def _kept(names: Iterable[Name], options: GenerationOptions) -> Iterable[Name]:
    """Yield the names of an answer that will be recorded: a rule that is off records nothing."""
    off = set(RULES) - set(active_rules(options))
    return (name for name in names if name.when != "image" and name.name.rpartition(".")[2] not in off)


def active_rules(options: GenerationOptions) -> tuple[str, ...]:
    """Return the names of the rules that `options` switch on, in the order in which they act."""
    on = {
        "repetition_penalty": options.repetition_penalty != 1.0,
        "no_repeat_ngram": options.no_repeat_ngram_size > 0,
        "min_new_tokens": options.min_new_tokens > 0,
        "forced_bos_token": options.forced_bos_token_id is not None,
        "forced_eos_token": options.forced_eos_token_id is not None,
    }
    return tuple(rule for rule in RULES if on[rule])


def _through_answer(name: Name, letters: Mapping[str, int], steps: int) -> int:
    if name.when != "step":
        return _count(name, letters)
    if "bans" in name.shape:
        return 0
    if name.grows:
        return _count(name, {**letters, "t": 1}) * steps * (steps + 1) // 2
    return _count(name, letters) * steps


def _count(name: Name, letters: Mapping[str, int]) -> int:
    count = 1
    for size in name.shape_for(letters):
        count *= size
    return count


def _item(name: Name, dtype: torch.dtype) -> int:
    """Return the bytes of one element; scores are float32 even where the weights have a smaller type."""
    return _BYTES.get(name.dtype, dtype.itemsize if name.dtype == "model" else max(4, dtype.itemsize))
