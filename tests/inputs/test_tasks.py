"""Tasks, their sentences, and what is refused."""

from collections.abc import Iterator
from typing import Any

import pytest

from florence2.errors import PromptError
from florence2.inputs import tasks
from florence2.inputs.tasks import (
    TASKS,
    FreePrompt,
    Task,
    TaskTable,
    build_sentence,
    check_prompt,
    find_task,
    parse_task_kind,
    register_task,
    split_prompt,
    token_task,
)
from parity.records import read_record


@pytest.fixture
def clean_registry() -> Iterator[None]:
    before = dict(tasks._TASKS)
    yield
    tasks._TASKS.clear()
    tasks._TASKS.update(before)


def test_recorded_sentences() -> None:
    for record in read_record("tokens.json")["prompts"]:
        assert build_sentence(*split_prompt(record["text"])) == record["prompt"]


def test_fifteen_tasks() -> None:
    assert len(TASKS) == 15
    assert [task.token for task in TASKS.values() if task.takes == "nothing"] == [
        "<OCR>",
        "<OCR_WITH_REGION>",
        "<CAPTION>",
        "<DETAILED_CAPTION>",
        "<MORE_DETAILED_CAPTION>",
        "<OD>",
        "<DENSE_REGION_CAPTION>",
        "<REGION_PROPOSAL>",
    ]


def test_the_input_may_stand_in_the_prompt_or_beside_it() -> None:
    together = split_prompt("<OPEN_VOCABULARY_DETECTION>a car")
    assert (
        together
        == split_prompt("<OPEN_VOCABULARY_DETECTION>", "a car")
        == split_prompt("open_vocabulary_detection", "a car")
    )
    assert build_sentence(*together) == "Locate a car in the image."


def test_braces_in_the_input_are_only_text() -> None:
    assert (
        build_sentence(*split_prompt("<OPEN_VOCABULARY_DETECTION>", "{input} {0}"))
        == "Locate {input} {0} in the image."
    )


def test_free_prompts_pass_through() -> None:
    assert split_prompt("What is in the image, exactly?") == (None, "What is in the image, exactly?")
    assert split_prompt("<od>") == (None, "<od>")


@pytest.mark.parametrize(
    ("prompt", "text", "words"),
    [
        ("<VQA>", None, "Unknown task <VQA>. Known tasks: <OCR>, .*<REGION_TO_OCR>"),
        ("<VQA>", "how many?", "Unknown task <VQA>"),
        ("<OD>", "cars", "takes no input"),
        ("<OD>cars", None, "takes no input"),
        ("<CAPTION_TO_PHRASE_GROUNDING>", None, "needs a text"),
        ("<CAPTION_TO_PHRASE_GROUNDING>", "  ", "needs a text"),
        ("<REGION_TO_OCR>", None, "needs a region"),
        ("<OPEN_VOCABULARY_DETECTION>a car", "a dog", "twice"),
        ("Where is", "the car?", "takes no separate input"),
    ],
)
def test_wrong_prompts_get_a_sentence(prompt: str, text: str | None, words: str) -> None:
    with pytest.raises(PromptError, match=words):
        split_prompt(prompt, text)


def test_users_are_refused_more_than_the_reference_refuses() -> None:
    assert split_prompt("<VQA>how many?") == (None, "<VQA>how many?")
    with pytest.raises(PromptError, match="Unknown task <VQA>"):
        check_prompt("<VQA>how many?")
    with pytest.raises(PromptError, match="four location tokens"):
        check_prompt("<REGION_TO_CATEGORY>", "the red one")
    check_prompt("<REGION_TO_CATEGORY><loc_1><loc_2><loc_3><loc_4>")


@pytest.mark.usefixtures("clean_registry")
def test_a_fine_tune_adds_its_own() -> None:
    task = register_task("<COUNT>", "How many {input} are in the image?")
    assert task.takes == "text" and find_task("count") is task
    assert build_sentence(*split_prompt("<COUNT>cats")) == "How many cats are in the image?"
    assert register_task("<COUNT>", "How many {input} are in the image?") == task  # again, the same: fine
    assert register_task("<CROP>", "What is in {input}?", answer="boxes", takes="region").takes == "region"


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("count", "How many?"), "a word of at most 64 characters in angle brackets"),
        (("<OD>", "Something else."), "already exists"),
        (("<COUNT>", "How many?", "masks"), "answer must be one of"),
        (("<COUNT>", "How many?", "text", "text"), "must contain"),
        (("<COUNT>", "How many {input}?", "text", "nothing"), "must not contain"),
    ],
)
def test_wrong_registrations_get_a_sentence(arguments: tuple[str, ...], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        register_task(*arguments)  # type: ignore[arg-type]


def test_the_public_table_cannot_be_changed_by_accident() -> None:
    with pytest.raises(TypeError):
        TASKS["<X>"] = TASKS["<OD>"]  # type: ignore[index]


@pytest.mark.parametrize(
    "region",
    [
        "<loc_5000><loc_1><loc_2><loc_3>",
        "<loc_9><loc_1><loc_2><loc_3>",
        "<loc_1><loc_1><loc_2><loc_3>" * 2,
        "hello <loc_1><loc_1><loc_2><loc_3>",
    ],
)
def test_a_region_is_four_locations_in_order(region: str) -> None:
    with pytest.raises(PromptError, match="needs a region"):
        check_prompt("<REGION_TO_CATEGORY>", region)
    check_prompt("<REGION_TO_CATEGORY>", "<loc_1><loc_1><loc_2><loc_999>")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "must be a token, an alias or a prompt"),
        ("  ", "must be a token, an alias or a prompt"),
        (None, "The task is None, not a string; the task comes before the image."),
        (5, "The task is 5, not a string"),
    ],
)
def test_empty_prompts_are_refused(prompt: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message):
        check_prompt(prompt)


# ---- tasks of one model ----------------------------------------------------------------------------------------------


DEPTH = Task("<DEPTH>", "How far away is each thing?")


@pytest.mark.usefixtures("clean_registry")
def test_a_table_has_the_models_tasks_after_all_others() -> None:
    table = TaskTable([DEPTH])
    register_task("<COUNT>", "How many {input} are in the image?")
    assert list(table) == [*TASKS, "<DEPTH>"] and len(table) == 17 and "<DEPTH>" not in TASKS
    assert find_task("depth", table) is DEPTH and find_task("depth") is None
    assert split_prompt("<COUNT>cats", tasks=table)[1] == "cats"
    with pytest.raises(PromptError, match="Task <DEPTH> takes no input"):
        split_prompt("<DEPTH>", "cats", table)
    with pytest.raises(PromptError, match="Unknown task <VQA>.*<COUNT>, <DEPTH>"):
        check_prompt("<VQA>", tasks=table)
    assert table.own == (DEPTH,) and "<DEPTH>" in repr(table)


@pytest.mark.usefixtures("clean_registry")
def test_the_models_own_task_counts() -> None:
    own = Task("<DEPTH>", "Another sentence.")
    table = TaskTable([own])
    register_task(DEPTH.token, DEPTH.sentence)
    assert table["<DEPTH>"] is own and TASKS["<DEPTH>"] == DEPTH and len(table) == 16


def test_all_problems_of_a_table_are_listed() -> None:
    with pytest.raises(PromptError) as raised:
        TaskTable([Task("<OD>", "x"), Task("depth", " "), Task("<A>", "{input}", answer="masks")])  # type: ignore[arg-type]
    for words in (
        "in angle brackets, such as",
        "sentence is empty",
        "answer must be one",
        "must not contain",
        "<OD> already",
    ):
        assert words in str(raised.value)


# ---- tasks that a fine-tune brings -----------------------------------------------------------------------------------

VQA = token_task("<VQA>")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("<VQA>What colour?", None),
        ("<VQA>", "What colour?"),
        ("vqa", "What colour?"),
        ("<VQA> What colour?", None),
        ("<VQA>", None),
        ("<VQA>a <VQA> b {input}", None),
        ("<VQA><loc_1><loc_2><loc_3><loc_4>", None),
    ],
)
def test_a_prompt_of_a_fine_tune_is_passed_on_unchanged(prompt: str, text: str | None) -> None:
    """As the reference does with every token that it does not know."""
    task, task_input = check_prompt(prompt, text, TaskTable([VQA]))
    assert task is VQA
    sent = prompt if text is None else f"<VQA>{text}"
    assert build_sentence(task, task_input) == sent


def test_a_token_in_the_middle_of_a_prompt_names_no_task_of_a_fine_tune() -> None:
    assert split_prompt("What is <VQA>?", tasks=TaskTable([VQA])) == (None, "What is <VQA>?")


def test_tokens_of_fine_tunes_are_words_in_any_case() -> None:
    for token in ("<DocVQA>", "<vqa>", "<DOC-VQA2>", "<cap>"):
        assert TaskTable([token_task(token)])[token].token == token
    for token in ("<s>", "<loc_5>", "VQA", "<V QA>", "<>", "<V><W>", f"<{'A' * 63}>", "<5>", "</poly>"):
        with pytest.raises(PromptError, match="a task token must be a word"):
            TaskTable([token_task(token)])
    with pytest.raises(PromptError, match="Task <od> has the same alias, od, as <OD>"):
        TaskTable([token_task("<od>")])


def test_a_task_that_takes_nothing_or_a_region() -> None:
    table = TaskTable([token_task("<GENERATE_TAGS>", takes="nothing"), token_task("<COUNT_IN>", takes="region")])
    assert build_sentence(*check_prompt("generate_tags", tasks=table)) == "<GENERATE_TAGS>"
    for prompt, words in (("<GENERATE_TAGS>please", "takes no input"), ("<COUNT_IN>", "needs a region")):
        with pytest.raises(PromptError, match=words):
            check_prompt(prompt, tasks=table)


def test_a_kind_in_one_word() -> None:
    assert parse_task_kind("VQA=text") == parse_task_kind("<VQA>=text") == VQA
    assert parse_task_kind("FIND=boxes") == token_task("<FIND>", "boxes")
    for text, words in (
        ("VQA", "is not NAME=KIND"),
        ("VQA=words", "answer must be one of text, boxes"),
        ("=text", "must be a word"),
    ):
        with pytest.raises(PromptError, match=words):
            parse_task_kind(text)


def test_declared_tasks_join_those_of_the_model() -> None:
    table = TaskTable([DEPTH])
    assert table.declared([VQA]).own == (DEPTH, VQA) and table.own == (DEPTH,)
    assert table.declared([token_task("<DEPTH>"), token_task("<OD>", "boxes")]) is table
    for task, kind in ((token_task("<DEPTH>", "boxes"), "text"), (token_task("<OD>"), "boxes")):
        with pytest.raises(PromptError, match=f"{task.token} of this model answers with {kind}, but is declared with"):
            table.declared([task])


# ---- free prompts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "near"),
    [
        ("OD", "od"),
        ("od ", "od"),
        ("[OD]", "od"),
        ("OD>", "od"),
        ("<od>", "<OD>"),
        ("</OD>", "<OD>"),
        ("<od> cars", "<OD>"),
        ("<OD", "<OD>"),
        ("detect", "od"),
        ("Caption", "caption"),
        ("<Caption>", "<CAPTION>"),
        ("caption:", "caption"),
        ("captoin", "caption"),
        ("MORE_DETAILED_CAPTION", "more_detailed_caption"),
        ("MORE_DETAILED_CAPTION>", "more_detailed_caption"),
        ("<MORE_DETAILED_CAPTION", "<MORE_DETAILED_CAPTION>"),
        ("<ocr_with_regions>", "<OCR_WITH_REGION>"),
        ("ocr-with-region", "ocr_with_region"),
        ("segment", "referring_expression_segmentation"),
        ("describe", "detailed_caption"),
        ("décris", None),
        ("<>", None),
        ("<loc_5>", None),
        ("x" * 100_000, None),
    ],
)
def test_a_word_or_token_that_is_not_a_task_gets_the_nearest_one(prompt: str, near: str | None) -> None:
    with pytest.raises(PromptError, match="Unknown task .* Known tasks: <OCR>, .*florence2.FreePrompt") as raised:
        check_prompt(prompt)
    words = str(raised.value)
    assert f"; did you mean {near}? Known" in words if near else "did you mean" not in words
    assert len(words) < 900


@pytest.mark.parametrize(
    "prompt",
    [
        *(
            "two words",
            "What is <od> here?",
            "图片里有什么？",
            "图片",
            "ภาพนี้คืออะไร",
            "写真のOCR結果を教えて",
            "ocr\u56fe\u7247\u6587\u5b57",
        ),
        *(
            "What does the image describe?",
            "Detect the objects.",
            "Describe the image",
            "a detailed caption of the dog",
        ),
        *("caption this", "Is there text?", "Read the text in the image", "the caption", "x " * 1000, "od " * 50),
        *(task.sentence for task in TASKS.values()),
    ],
)
def test_several_words_are_a_free_prompt(prompt: str) -> None:
    """Some scripts have no spaces between words."""
    assert check_prompt(prompt) == (None, prompt)


@pytest.mark.parametrize(
    ("prompt", "near"),
    [
        ("detailed caption", "detailed_caption"),
        ("more detailed caption", "more_detailed_caption"),
        ("More Detailed Caption.", "more_detailed_caption"),
        ("  DETAILED  CAPTION  ", "detailed_caption"),
        ("detailed-caption!", "detailed_caption"),
        ("\u201cdetailed caption\u201d", "detailed_caption"),
        ("\u2018caption\u2019", "caption"),
        (
            "\uff44\uff45\uff54\uff41\uff49\uff4c\uff45\uff44 \uff43\uff41\uff50\uff54\uff49\uff4f\uff4e",
            "detailed_caption",
        ),
        ("\uff2f\uff24", "od"),
        ("\uff1cOD\uff1e", "<OD>"),
        ("caption\u3002", "caption"),
        ("caption\u0e2f", "caption"),
        ("detect\u56fe", "od"),
        ("ocr\u56fe\u7247\u5b57", "ocr"),
        ("caption \U0001f600", "caption"),
        ("object detection", "od"),
        ("Object Detections", "od"),
        ("caption with region", "dense_region_caption"),
        ("dense region captions", "dense_region_caption"),
        ("region proposals", "region_proposal"),
        ("caption to phrase grounding", "caption_to_phrase_grounding"),
        ("Phrase Grounding", "caption_to_phrase_grounding"),
        ("referring expression segmentation", "referring_expression_segmentation"),
        ("open vocabulary detection", "open_vocabulary_detection"),
        ("open-vocabulary detection", "open_vocabulary_detection"),
        ("region to segmentation", "region_to_segmentation"),
        ("ocr with region", "ocr_with_region"),
        ("OCR with regions:", "ocr_with_region"),
        ("region to OCR", "region_to_ocr"),
        ("< detailed caption >", "<DETAILED_CAPTION>"),
    ],
)
def test_the_name_of_a_task_in_words_gets_the_task(prompt: str, near: str) -> None:
    with pytest.raises(PromptError, match=f"; did you mean {near}\\? Known tasks: <OCR>, ") as raised:
        check_prompt(prompt)
    assert "than one word and is not the name of a task, or is given as florence2.FreePrompt" in str(raised.value)
    assert check_prompt(FreePrompt(prompt)) == (None, prompt)


def test_every_task_is_known_in_words() -> None:
    for task in (*TASKS.values(), DEPTH):
        with pytest.raises(PromptError, match=f"did you mean {task.alias}\\?"):
            check_prompt(f"{task.alias.replace('_', ' ')} .", tasks=TaskTable([DEPTH]))
    assert check_prompt("depth map", tasks=TaskTable([DEPTH])) == (None, "depth map")


def test_a_token_in_full_width_brackets_is_looked_up_too() -> None:
    with pytest.raises(PromptError, match="Unknown task '\uff1cVQA\uff1e'. Known tasks"):
        check_prompt("\uff1cVQA\uff1e how many?")


@pytest.mark.parametrize("prompt", ["detect", "<od>", "<OD>", "od", "<VQA>", "<VQA>how many?", "Look at <OD> here"])
def test_a_free_prompt_is_whatever_is_said_to_be_one(prompt: str) -> None:
    assert check_prompt(FreePrompt(prompt)) == (None, prompt) and find_task(FreePrompt(prompt)) is None
    with pytest.raises(PromptError, match="takes no separate input"):
        check_prompt(FreePrompt(prompt), "a car")


def test_an_empty_free_prompt_is_refused() -> None:
    with pytest.raises(PromptError, match="must be a token, an alias or a prompt"):
        check_prompt(FreePrompt(" "))


def test_the_nearest_task_may_be_the_models_own() -> None:
    with pytest.raises(PromptError, match=r"did you mean depth\?"):
        check_prompt("depht", tasks=TaskTable([DEPTH]))


@pytest.mark.parametrize("digits", [5, 39, 5000])
def test_a_region_has_at_most_four_digits(digits: int) -> None:
    with pytest.raises(PromptError, match="needs a region") as raised:
        check_prompt("<REGION_TO_OCR>", f"<loc_{'9' * digits}>" * 4)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize("own", [5, None, [{"token": "<A>"}], [["<A>"]], b"<A>", [Task("<A>", ["x"])]])  # type: ignore[arg-type]
def test_a_table_of_anything_else_is_refused(own: Any) -> None:
    with pytest.raises(PromptError, match="is not a Task"):
        TaskTable(own)


@pytest.mark.parametrize(
    ("prompt", "text"), [("<OD>", "x" * 30_000), ("<OCR>" + "y" * 30_000, "x"), ("free words", "x" * 9999)]
)
def test_a_long_text_is_cut_in_the_message(prompt: str, text: str) -> None:
    with pytest.raises(PromptError) as caught:
        check_prompt(prompt, text)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("location", ["<loc_05>", "<loc_\u0663>", "<loc_1000>", "<loc_0007>"])
def test_a_region_is_spelt_as_its_tokens_are(location: str) -> None:
    """Otherwise the model reads the letters of the location, and no region."""
    with pytest.raises(PromptError, match="needs a region"):
        check_prompt("<REGION_TO_OCR>", f"{location}<loc_2><loc_999><loc_999>")


def test_a_space_before_a_token_of_a_fine_tune_is_named() -> None:
    with pytest.raises(PromptError, match="<VQA> must be the first thing in the prompt; remove the space"):
        check_prompt(" <VQA>what?", tasks=TaskTable([VQA]))
