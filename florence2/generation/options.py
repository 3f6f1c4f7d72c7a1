"""The settings of one generation, checked when they are made."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal

from florence2.errors import OptionError, plain, shown

if TYPE_CHECKING:
    from florence2.generation.rules import Rule  # needs torch

RULE_NAMES = ("repetition_penalty", "no_repeat_ngram", "min_new_tokens", "forced_bos_token", "forced_eos_token")
"""The names of the built-in rules, in the order in which they act; extra rules act before the two forced ids."""
NOT_IN_CHECKPOINTS = ("extra_rules", "sample", "temperature", "top_k", "top_p", "seed", "confidence")
"""The settings of a call alone: no checkpoint states them, and none is saved with them."""
_MOST_PENALTY = 100  # keeps powers of lengths, and scores, finite
_LEAST = {
    "num_beams": 1,
    "max_new_tokens": 1,
    "min_new_tokens": 0,
    "no_repeat_ngram_size": 0,
    "num_return_sequences": 1,
    "top_k": 0,
}
_RANGES = {
    "length_penalty": (-_MOST_PENALTY, _MOST_PENALTY),
    "temperature": (0.01, 100),  # smaller ones leave nothing but the likeliest id, and divide by almost 0
}
_ABOVE_0 = {"repetition_penalty": _MOST_PENALTY, "top_p": 1}


@dataclass(frozen=True)
class SpecialIds:
    """The ids that the search itself must know."""

    start: int = 2
    """Where every sequence begins; not generated."""
    end: int = 2
    pad: int = 1


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

    sample: bool = False
    """Draw each id at random, by its probability, in place of searching. `changed` and `f.options` then set
    `num_beams` to 1 unless it is given. `num_return_sequences` samples are drawn for each input, and stay in the order
    in which they were drawn: a sample that was chosen by its score would not be a sample."""
    temperature: float = 1.0
    """Divides the log-probabilities before sampling, 0.01 to 100: below 1 likely ids become likelier."""
    top_k: int = 0
    """Sample only from this many of the likeliest ids; 0 is all."""
    top_p: float = 1.0
    """Sample only from the smallest set of likeliest ids whose probabilities sum to this, above 0 to 1 (nucleus
    sampling); computed after `temperature` and `top_k`."""
    seed: int | None = None
    """Seed of sampling. Every input is seeded with it, so an input has the same answer alone and in any batch. None
    draws from torch's default generator."""
    extra_rules: "tuple[Rule, ...]" = ()
    """Rules of one's own (`florence2.Rule`), such as `florence2.OnlyLabels`, in the order in which they act: after the
    built-in rules and before the forced ids."""
    confidence: bool = True
    """Give boxes, quads, polygons and texts a confidence, for which each finished answer is read once more (see
    `florence2.answers.confidence`); it changes no token. Within `f.patched`, steps of the decoder that are patched
    have none; neither has `florence2.generate`, which knows no locations."""

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
        problems = [*_out_of_range(self), *_rule_problems(self.extra_rules)] or [*_conflicts(self)]
        if problems:
            raise OptionError("; ".join(problems) + ".")

    @property
    def width(self) -> int:
        """How many sequences are written side by side for each input: the beams, or the samples."""
        return self.num_return_sequences if self.sample else self.num_beams

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
        """Return a copy with some settings changed.

        `sample=True` also sets `num_beams` to 1, unless it is given. Raises OptionError for unknown names and wrong
        values.
        """
        known = [field.name for field in fields(self)]
        unknown = [name for name in changes if name not in known]
        if unknown:
            raise OptionError(f"Unknown generation settings: {', '.join(unknown)}. Known ones: {', '.join(known)}.")
        if plain(changes.get("sample")) is True:
            changes = {"num_beams": 1, **changes}  # the checkpoint's own number is one of beams
        return replace(self, **changes)

    def fitted(self, vocabulary: int, positions: int) -> "GenerationOptions":
        """Lower `max_new_tokens` to a model's positions. Raises OptionError for a forced id outside its vocabulary."""
        for id in (self.forced_bos_token_id, self.forced_eos_token_id):
            if id is not None and id >= vocabulary:
                raise OptionError(f"The forced id {id} is outside this model's vocabulary of {vocabulary} ids.")
        # the last id is generated but never read, so as many can be generated as there are positions
        return self.changed(max_new_tokens=min(self.max_new_tokens, positions))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; extra rules are listed by their names."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"extra_rules": [rule.name for rule in self.extra_rules]}


def _out_of_range(options: GenerationOptions) -> Iterator[str]:
    """Yield a clause for every value that no generation could use."""
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if type(value) is not int or value < least:
            yield f"{name} is {value!r}; it must be a whole number of at least {least}"
    for name, (lowest, highest) in _RANGES.items():
        value = getattr(options, name)
        if type(value) not in (int, float) or not lowest <= value <= highest:
            yield f"{name} is {value!r}; it must be {lowest} to {highest}"
    for name, most in _ABOVE_0.items():
        value = getattr(options, name)
        if type(value) not in (int, float) or not 0 < value <= most:
            yield f"{name} is {value!r}; it must be above 0 and at most {most}"
    if type(options.early_stopping) is not bool and options.early_stopping != "never":
        yield f'early_stopping is {options.early_stopping!r}; it must be True, False or "never"'
    for name in ("sample", "confidence"):
        if type(getattr(options, name)) is not bool:
            yield f"{name} is {getattr(options, name)!r}; it must be True or False"
    for name in ("forced_bos_token_id", "forced_eos_token_id"):
        value = getattr(options, name)
        if value is not None and (type(value) is not int or value < 0):
            yield f"{name} is {value!r}; it must be an id or None"
    if options.seed is not None and (type(options.seed) is not int or not 0 <= options.seed < 1 << 63):
        yield f"seed is {options.seed!r}; it must be a whole number from 0 to 2**63 - 1, or None"


def _rule_problems(rules: Any) -> Iterator[str]:
    """Yield a clause for everything in `extra_rules` that cannot act as a rule."""
    if not isinstance(rules, tuple):
        yield f"extra_rules is {shown(rules)}; it must be a tuple of rules, such as (rule,)"
        return
    taken = list(RULE_NAMES)
    for rule in rules:
        name, lacks = getattr(rule, "name", None), [*_lacks(rule)]
        if lacks:
            yield f"the extra rule {shown(rule)} lacks {' and '.join(lacks)}; see florence2.Rule"
        elif not isinstance(name, str) or not name.isidentifier():
            yield f"an extra rule's name is {shown(name)}; it must be letters, digits and _, such as 'only_labels'"
        elif name in taken:
            yield f"the extra rule's name {name!r} is taken by another rule; give it another name"
        else:
            taken.append(name)


def _lacks(rule: Any) -> Iterator[str]:
    if not hasattr(rule, "name"):
        yield "`name`"
    if not callable(getattr(rule, "applies", None)):
        yield "`applies(generated)`"
    if not callable(rule) or isinstance(rule, type):  # a class is callable, but what it returns is not scores
        yield "`__call__(scores, sequences, generated)`"


def _conflicts(options: GenerationOptions) -> Iterator[str]:
    """Yield a clause for settings that contradict each other."""
    if options.sample and options.num_beams > 1:
        yield f"sample is True and num_beams {options.num_beams}; sampling uses no beams, so set num_beams=1"
    if not options.sample and options.num_return_sequences > options.num_beams:
        yield f"num_return_sequences {options.num_return_sequences} is more than num_beams {options.num_beams}"
    if not options.sample:
        for name, default in (("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("seed", None)):
            if getattr(options, name) != default:
                yield f"{name} {getattr(options, name)!r} has no effect without sampling; set sample=True as well"


def nothing_possible(n: int, rules: "Sequence[Rule]") -> OptionError:
    """Return the error about extra rules that leave no possible n-th id."""
    names = ", ".join(rule.name for rule in rules)
    return OptionError(
        f"The rules leave no possible id at position {n} of an answer; an extra rule ({names}) must leave at "
        "least one, such as the end id."
    )


def wrong_result(rule: str, got: str, shape: tuple[int, ...]) -> OptionError:
    """Return the error about a rule that returned something else than scores of `shape`."""
    return OptionError(f"The rule {rule} returned {got}; it must return the scores, {tuple(shape)}.")
