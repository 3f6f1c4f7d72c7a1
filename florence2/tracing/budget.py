"""How many bytes a trace will keep, known before anything is computed."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch

from florence2.errors import OptionError
from florence2.generation.options import GenerationOptions
from florence2.model.config import Florence2Config
from florence2.tracing.names import RULES, Name, picture_letters

DEFAULT_LIMIT = 2 << 30
_BYTES = {"int64": 8, "bool": 1}


@dataclass(frozen=True)
class AnswerSizes:
    """What decides how large the values of one batch of answers are: B prompts of N image tokens and up to P ids."""

    batch: int
    image_tokens: int
    prompt: int
    options: GenerationOptions

    def letters(self) -> dict[str, int]:
        """The letters of the shapes."""
        B, K, N, P = self.batch, self.options.num_beams, self.image_tokens, self.prompt
        return {"B": B, "K": K, "N": N, "P": P, "S": N + P, "candidates": 1 if K == 1 else 2 * K}


def picture_bytes(
    names: Iterable[Name], config: Florence2Config, shape: Sequence[int], dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of `names` for pixel values of `shape` (B, 3, H, W)."""
    return sum(
        _count(name, picture_letters(config.vision, shape, name.stage)) * _item(name, dtype)
        for name in names
        if name.when == "picture"
    )


def answer_bytes(
    names: Iterable[Name], config: Florence2Config, sizes: AnswerSizes, dtype: torch.dtype = torch.float32
) -> int:
    """Bytes of `names` for answers at their limit; what rules banned, a few ids a step, is not counted."""
    steps = min(sizes.options.max_new_tokens, config.text.max_position_embeddings)
    letters = sizes.letters()
    return sum(_through_answer(name, letters, steps) * _item(name, dtype) for name in _kept(names, sizes.options))


def check_fits(predicted: int, held: int, limit: int, what: str, remedy: str) -> None:
    """Raises OptionError when `predicted` bytes more than the `held` ones would pass the limit."""
    if held + predicted > limit:
        already = f" beside the {_megabytes(held)} held already" if held else ""
        raise OptionError(
            f"The trace of {what} may take {_megabytes(predicted)}{already}, more than the limit of "
            f"{_megabytes(limit)}; {remedy}name less, or set a higher `limit` (in bytes)."
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def longest_answer(
    names: Sequence[Name], config: Florence2Config, sizes: AnswerSizes, dtype: torch.dtype, room: int
) -> int:
    """The largest `max_new_tokens` whose trace fits into `room` bytes; 0 when none does."""
    low, high = 0, sizes.options.max_new_tokens
    while low < high:
        middle = (low + high + 1) // 2
        tried = AnswerSizes(sizes.batch, sizes.image_tokens, sizes.prompt, sizes.options.changed(max_new_tokens=middle))
        low, high = (middle, high) if answer_bytes(names, config, tried, dtype) <= room else (low, middle - 1)
    return low


def _kept(names: Iterable[Name], options: GenerationOptions) -> Iterable[Name]:
    """Those of an answer that will occur: a rule that is off shows nothing."""
    off = set(RULES) - set(active_rules(options))
    return (name for name in names if name.when != "picture" and name.name.rpartition(".")[2] not in off)


def active_rules(options: GenerationOptions) -> tuple[str, ...]:
    """The names of the rules that `options` switch on, in the order in which they act."""
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
    if any("t" in part.split("·") for part in name.shape):
        return _count(name, {**letters, "t": 1}) * steps * (steps + 1) // 2
    return _count(name, letters) * steps


def _count(name: Name, letters: Mapping[str, int]) -> int:
    count = 1
    for size in name.shape_for(letters):
        count *= size
    return count


def _item(name: Name, dtype: torch.dtype) -> int:
    """Bytes of one element; scores are float32 even where the weights are of a smaller type."""
    return _BYTES.get(name.kind, dtype.itemsize if name.kind == "model" else max(4, dtype.itemsize))
