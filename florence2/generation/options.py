"""The settings of one generation, checked when they are made."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from florence2.errors import OptionError

_MOST_PENALTY = 100  # keeps powers of lengths, and scores, finite
_LEAST = {
    "num_beams": 1,
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
}


@dataclass(frozen=True)
class GenerationOptions:
    """The settings of one generation, immutable. The defaults are those of the published checkpoints.

    `Florence2.options()` returns a checkpoint's own settings, which `from_settings(config.generation)` reads.

    Raises:
        OptionError: listing every value that is out of range or in conflict with another.
    """

    num_beams: int = 3
    """Number of beams; 1 is greedy search."""
    max_new_tokens: int = 1024
    """Upper limit of the generated ids, the end id included; a model's positions may set a lower limit."""
    min_new_tokens: int = 0
    """The end id is impossible before this many."""
    length_penalty: float = 1.0
    """Exponent of the length that divides a hypothesis' summed log-probability; above 0 favours long hypotheses."""
    early_stopping: bool | Literal["never"] = True
    """When to stop once K hypotheses are finished: True stops at once; False stops when the best running beam could
    not beat the worst of them at its present length; "never" stops only when it could not at any length."""
    no_repeat_ngram_size: int = 3
    """No n-gram of this many ids occurs twice; 0 switches the rule off."""
    repetition_penalty: float = 1.0
    """Above 1 makes ids that already occurred less likely."""
    num_return_sequences: int = 1
    """How many of the K hypotheses are returned for each input, best first."""
    forced_bos_token_id: int | None = 0
    """The id that must be generated first."""
    forced_eos_token_id: int | None = 2
    """The id that must be generated last when `max_new_tokens` is reached."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} is {getattr(self, name)!r}; it must be a whole number of at least {least}"
            for name, least in _LEAST.items()
            if type(getattr(self, name)) is not int or getattr(self, name) < least
        ]
        if type(self.early_stopping) is not bool and self.early_stopping != "never":
            problems.append(f'early_stopping is {self.early_stopping!r}; it must be True, False or "never"')
        if type(self.length_penalty) not in (int, float) or not abs(self.length_penalty) <= _MOST_PENALTY:
            problems.append(
                f"length_penalty is {self.length_penalty!r}; it must be -{_MOST_PENALTY} to {_MOST_PENALTY}"
            )
        if type(self.repetition_penalty) not in (int, float) or not 0 < self.repetition_penalty <= _MOST_PENALTY:
            problems.append(
                f"repetition_penalty is {self.repetition_penalty!r}; it must be above 0 and at most {_MOST_PENALTY}"
            )
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 0):
                problems.append(f"{name} is {value!r}; it must be an id or None")
        if not problems and self.num_return_sequences > self.num_beams:
            problems.append(f"num_return_sequences {self.num_return_sequences} is more than num_beams {self.num_beams}")
        if problems:
            raise OptionError("; ".join(problems) + ".")

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> "GenerationOptions":
        """Return the settings that a checkpoint's files state.

        What the files leave out is off, as in transformers, except `max_new_tokens`, which keeps this class' default.
        Raises OptionError as `changed` does.
        """
        off: dict[str, Any] = {
            "num_beams": 1,
            "early_stopping": False,
            "no_repeat_ngram_size": 0,
            "forced_bos_token_id": None,
            "forced_eos_token_id": None,
        }
        return cls().changed(**{**off, **settings})

    def changed(self, **changes: Any) -> "GenerationOptions":
        """Return a copy with some settings changed. Raises OptionError for unknown names and wrong values."""
        known = [field.name for field in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise OptionError(f"Unknown generation settings: {', '.join(unknown)}. Known ones: {', '.join(known)}.")
        return replace(self, **changes)
