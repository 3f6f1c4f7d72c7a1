"""Rules of one's own: what is accepted, when they act, and that every path obeys them."""

import inspect
import math
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import florence2
from florence2 import Florence2, GenerationOptions
from florence2.errors import OptionError
from florence2.fast.cuda.recorded.graphs import record_with
from florence2.fast.cuda.recorded.lane import search_recorded
from florence2.fast.install import install
from florence2.generation.options import RULE_NAMES
from florence2.generation.rules import Rule
from florence2.generation.search import search
from florence2.generation.state import SpecialIds, logit_rules
from parity.recipe import make_picture


class Even:
    """Only ids of even numbers, and the end, which is 2."""

    name = "even"

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[int, ...], ...]] = []

    def applies(self, generated: int) -> bool:
        return generated >= 1

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Tensor:
        self.calls.append((tuple(scores.shape), tuple(sequences.shape), tuple(generated.shape)))
        scores[:, 1::2] = -math.inf
        return scores


def rule_of_the_docstring() -> Any:
    """Run the example in the documentation of `Rule`."""
    text = inspect.getdoc(Rule) or ""
    code = text[text.index("    class NotTwice") : text.index("    f.run(")]
    space: dict[str, Any] = {}
    exec(textwrap.dedent(code), space)
    return space["NotTwice"]()


SEARCHES: list[dict[str, Any]] = [{"num_beams": 1}, {"num_beams": 3}, {"sample": True, "seed": 4}]


@pytest.mark.parametrize("changes", SEARCHES, ids=str)
def test_every_path_obeys(
    small: Florence2, small_folder: Path, images: list[Image.Image], changes: dict[str, Any]
) -> None:
    rule = Even()
    plain = small.options(max_new_tokens=12, min_new_tokens=8, no_repeat_ngram_size=0, **changes)
    options = plain.changed(extra_rules=(rule,))
    default = small.run("<OD>", images[0], options=options)
    eager = florence2.load(small_folder, attention="eager").run("<OD>", images[0], options=options)
    with small.trace("decoder.layers.0", "scores") as t:
        traced = small.run("<OD>", images[0], options=options)
    assert default.token_ids == eager.token_ids == traced.token_ids
    assert all(id % 2 == 0 for id in default.token_ids)
    assert any(id % 2 for id in small.run("<OD>", images[0], options=plain).token_ids)
    assert t.along_answer("scores").shape[0] == len(default.token_ids) - 1
    K, V = options.width, small.model.config.text.vocab_size
    assert {*rule.calls} == {((K, V), (K, 13), (K,))}


def test_a_batch_gives_what_each_request_gives_alone(small: Florence2) -> None:
    requests = [("<OD>", make_picture(seed, 60, 40)) for seed in range(3)]
    options = small.options(max_new_tokens=10, extra_rules=(Even(),))
    together = small.run_batch(requests, options=options)
    assert [a.token_ids for a in together] == [small.run(*request, options=options).token_ids for request in requests]


@torch.inference_mode()
@pytest.mark.parametrize("changes", SEARCHES, ids=str)
def test_graphs_step_aside(small: Florence2, changes: dict[str, Any]) -> None:
    memory, ids = torch.randn(1, 9, 64), SpecialIds()
    options = small.options(max_new_tokens=5, extra_rules=(Even(),), **changes)

    def record(work: Callable[[], None], device: torch.device) -> Callable[[], None]:
        return work

    plain = options.changed(extra_rules=(), sample=False, seed=None)
    with record_with(record):
        assert search_recorded(install(small.model), memory, options, ids, None) is None
        assert search_recorded(install(small.model), memory, plain, ids, None) is not None


def test_the_example_of_the_documentation(small: Florence2, images: list[Image.Image]) -> None:
    twice = search(lambda newest: _likes(newest), lambda _: None, 1, _options(), SpecialIds())
    assert twice.sequences[0].tolist() == [2, 5, 5, 5]
    once = search(lambda newest: _likes(newest), lambda _: None, 1, _options(rule_of_the_docstring()), SpecialIds())
    assert once.sequences[0].tolist() == [2, 5, 4, 5]


def _options(*rules: Rule) -> GenerationOptions:
    return GenerationOptions.from_settings({"max_new_tokens": 3}).changed(extra_rules=rules)


def _likes(newest: Tensor) -> Tensor:
    """Logits of ids 0 to 5, the larger the likelier."""
    return torch.arange(6.0).expand(len(newest), -1)


def test_they_act_after_the_built_in_rules_and_before_the_forced_ids() -> None:
    options = GenerationOptions(repetition_penalty=1.1, min_new_tokens=2, extra_rules=(Even(),))
    names = [rule.name for rule in logit_rules(options, SpecialIds())]
    assert names == [*RULE_NAMES[:3], "even", *RULE_NAMES[3:]]
    odd_end = search(
        lambda newest: _likes(newest), lambda _: None, 1, _options(Even()).changed(forced_eos_token_id=3), SpecialIds()
    )
    assert odd_end.sequences[0].tolist() == [2, 5, 4, 3] and odd_end.finish_reasons == ("length",)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ([Even()], r"extra_rules is \[.*; it must be a tuple of rules, such as \(rule,\)"),
        (Even(), "it must be a tuple"),
        ((3,), "the extra rule 3 lacks `name` and `applies.generated.` and `__call__"),
        ((Even,), "lacks `__call__"),
        ((lambda scores, *_: scores,), "lacks `name` and `applies.generated.`; see florence2.Rule"),
        ((Even(), Even()), "the extra rule's name 'even' is taken"),
    ],
)
def test_what_is_not_a_rule(rules: Any, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        GenerationOptions(extra_rules=rules)


@pytest.mark.parametrize(("name", "words"), [("no_repeat_ngram", "is taken"), ("my rule", "letters"), (7, "letters")])
def test_names_of_rules(name: Any, words: str) -> None:
    rule = Even()
    rule.name = name
    with pytest.raises(OptionError, match=words):
        GenerationOptions(extra_rules=(rule,))


def test_options_with_rules_as_plain_values() -> None:
    values = GenerationOptions(extra_rules=(Even(),)).to_dict()
    assert values["extra_rules"] == ["even"] and values["num_beams"] == 3


class Returns(Even):
    """A rule that returns something wrong, or leaves nothing."""

    def __init__(self, result: Callable[[Tensor], Any]):
        super().__init__()
        self.result = result

    def __call__(self, scores: Tensor, sequences: Tensor, generated: Tensor) -> Any:  # type: ignore[override]
        return self.result(scores)


@pytest.mark.parametrize("changes", SEARCHES, ids=str)
@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda scores: None, "The rule even returned NoneType; it must return the scores"),
        (lambda scores: scores[:, :3], r"returned a tensor \(\d, 3\)"),
        (
            lambda scores: scores.fill_(-math.inf),
            r"The rules leave no possible id at position 2 of an answer; .*\(even\)",
        ),
        (lambda scores: scores.fill_(math.nan), "leave no possible id"),
    ],
)
def test_what_a_rule_may_not_do(
    small: Florence2, images: list[Image.Image], changes: dict[str, Any], result: Callable[[Tensor], Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        small.run("<OD>", images[0], max_new_tokens=5, extra_rules=(Returns(result),), **changes)


def test_no_other_sample_can_take_the_place_of_one_without_an_id(small: Florence2, images: list[Image.Image]) -> None:
    def end_first(scores: Tensor) -> Tensor:
        scores[0] = -math.inf
        return scores

    options = small.options(sample=True, num_return_sequences=2, max_new_tokens=6, extra_rules=(Returns(end_first),))
    with pytest.raises(OptionError, match="leave no possible id"):
        small.run("<OD>", images[0], options=options)


def test_a_beam_that_a_rule_ends_is_replaced(small: Florence2, images: list[Image.Image]) -> None:
    """One of the three beams is left without any id; the others answer."""

    def end_first_beam(scores: Tensor) -> Tensor:
        scores[0] = -math.inf
        return scores

    rule = Returns(end_first_beam)
    answer = small.run("<OD>", images[0], max_new_tokens=6, num_beams=3, extra_rules=(rule,))
    assert answer.sequence_score is not None and math.isfinite(answer.sequence_score)
    options = replace(small.options(max_new_tokens=6), num_beams=3)
    assert answer.token_ids != small.run("<OD>", images[0], options=options).token_ids
