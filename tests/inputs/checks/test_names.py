"""Names of tasks in prompts: which words in brackets may be a mistyped token."""

import pytest

from florence2.inputs.checks.names import leading_token


@pytest.mark.parametrize(
    "prompt",
    [
        "<loc_1><loc_2><loc_3><loc_4> what is it?",
        "<s>What is this?",
        "< 5 apples and > 3 pears",
        "<3 cats?>",
        "〈图〉是什么？",
    ],
)
def test_words_that_begin_with_a_bracket_are_not_a_token(prompt: str) -> None:
    assert leading_token(prompt) is None


@pytest.mark.parametrize("prompt", ["<Caption>", "＜ＯＤ＞", "<OD of all>", "<VQB>what?"])
def test_what_may_be_a_mistyped_token(prompt: str) -> None:
    assert leading_token(prompt) is not None
