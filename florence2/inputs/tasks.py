"""The tasks Florence-2 was trained on: the token a user writes, the sentence the model reads, the answer it gives.

The sentences are part of the trained model: another wording is another prompt.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, get_args

from florence2.errors import PromptError
from florence2.inputs.coordinates import NUM_BINS

TaskInput = Literal["nothing", "text", "region"]
AnswerKind = Literal["text", "boxes", "proposals", "phrases", "quads", "polygons", "boxes_or_polygons"]


@dataclass(frozen=True)
class Task:
    """One task.

    `sentence` holds "{input}" where the text that follows the token goes. `takes` says what that text is: nothing,
    free text, or a region (four location tokens). `answer` names how the generated text is read (see `parsing.py`).
    """

    token: str
    sentence: str
    answer: AnswerKind = "text"
    takes: TaskInput = "nothing"

    @property
    def alias(self) -> str:
        """The token as one types it on a command line: `<OCR_WITH_REGION>` is `ocr_with_region`."""
        return self.token.strip("<>").lower()


def _region(token: str, sentence: str, answer: AnswerKind = "text") -> Task:
    return Task(token, sentence, answer, "region")


# In the reference's order, which decides when a prompt holds two task tokens.
_TASKS: dict[str, Task] = {
    task.token: task
    for task in (
        Task("<OCR>", "What is the text in the image?"),
        Task("<OCR_WITH_REGION>", "What is the text in the image, with regions?", "quads"),
        Task("<CAPTION>", "What does the image describe?"),
        Task("<DETAILED_CAPTION>", "Describe in detail what is shown in the image."),
        Task("<MORE_DETAILED_CAPTION>", "Describe with a paragraph what is shown in the image."),
        Task("<OD>", "Locate the objects with category name in the image.", "boxes"),
        Task("<DENSE_REGION_CAPTION>", "Locate the objects in the image, with their descriptions.", "boxes"),
        Task("<REGION_PROPOSAL>", "Locate the region proposals in the image.", "proposals"),
        Task("<CAPTION_TO_PHRASE_GROUNDING>", "Locate the phrases in the caption: {input}", "phrases", "text"),
        Task("<REFERRING_EXPRESSION_SEGMENTATION>", "Locate {input} in the image with mask", "polygons", "text"),
        _region("<REGION_TO_SEGMENTATION>", "What is the polygon mask of region {input}", "polygons"),
        Task("<OPEN_VOCABULARY_DETECTION>", "Locate {input} in the image.", "boxes_or_polygons", "text"),
        _region("<REGION_TO_CATEGORY>", "What is the region {input}?"),
        _region("<REGION_TO_DESCRIPTION>", "What does the region {input} describe?"),
        _region("<REGION_TO_OCR>", "What text is in the region {input}?"),
    )
}
TASKS: Mapping[str, Task] = MappingProxyType(_TASKS)
"""Every known task by its token: the fifteen published ones, then those of `register_task`."""

_TOKEN = re.compile(r"<[A-Z][A-Z0-9_]*>")
_REGION = re.compile(r"\s*<loc_(\d+)><loc_(\d+)><loc_(\d+)><loc_(\d+)>\s*")


def register_task(token: str, sentence: str, answer: AnswerKind = "text", takes: TaskInput | None = None) -> Task:
    """Add a task that a fine-tune was trained on, for this process; return it.

    `token` looks like "<COUNT>". `sentence` is what the model reads, with "{input}" where the user's text goes;
    `takes` follows from that ("text" or "nothing") and need be given only for "region".
    Raises PromptError when the token is taken by another task, or the parts do not fit each other.
    """
    takes = takes or ("text" if "{input}" in sentence else "nothing")
    if not _TOKEN.fullmatch(token):
        raise PromptError(f"The task token {token!r} must be capitals in angle brackets, such as '<COUNT>'.")
    if answer not in get_args(AnswerKind) or takes not in get_args(TaskInput):
        raise PromptError(
            f"Task {token}: answer must be one of {', '.join(get_args(AnswerKind))} and takes one of "
            f"{', '.join(get_args(TaskInput))}, not {answer!r} and {takes!r}."
        )
    if (takes != "nothing") != ("{input}" in sentence):
        raise PromptError(
            f"Task {token} takes {takes}, so its sentence must {_should(takes)} '{{input}}': {sentence!r}."
        )
    task = Task(token, sentence, answer, takes)
    if _TASKS.get(token, task) != task:
        raise PromptError(
            f"Task {token} already exists with the sentence {_TASKS[token].sentence!r}; choose another token."
        )
    _TASKS[token] = task
    return task


def find_task(prompt: str) -> Task | None:
    """The task whose token stands in `prompt`, or whose alias `prompt` is; None for a prompt without one."""
    for task in _TASKS.values():
        if task.token in prompt or task.alias == prompt:
            return task
    return None


def split_prompt(prompt: str, text: str | None = None) -> tuple[Task | None, str]:
    """A prompt as users write it -> (task, its input), or (None, the prompt itself).

    The input may follow the token in one string, as in the reference, or be given as `text`.
    Raises PromptError for an unknown task token standing alone, for a missing input and for a superfluous one.
    """
    task = find_task(prompt)
    if task is None:
        if _TOKEN.fullmatch(prompt):
            raise unknown_task(prompt)
        if text:
            raise PromptError(
                f"A prompt without a task token takes no separate input, but got {text!r}; write one text."
            )
        return None, prompt
    rest = "" if task.alias == prompt else prompt.replace(task.token, "")
    if text is not None and rest:
        raise PromptError(f"Task {task.token} got its input twice: {rest!r} in the prompt and {text!r} beside it.")
    given = text if text is not None else rest
    if task.takes == "nothing" and given:
        raise PromptError(f"Task {task.token} takes no input, but got {given!r}; leave it out.")
    if task.takes != "nothing" and not given.strip():
        wanted = "a region: a box in pixels, or four location tokens" if task.takes == "region" else "a text"
        raise PromptError(f"Task {task.token} needs {wanted}.")
    return task, given


def build_sentence(task: Task | None, given: str) -> str:
    """What the model reads for a task and its input, or the free prompt itself."""
    return given if task is None else task.sentence.replace("{input}", given)


def check_prompt(prompt: str, text: str | None = None) -> tuple[Task | None, str]:
    """Split a prompt as `split_prompt` does, and refuse what the reference accepts but no model was trained to read.

    Raises PromptError for an empty prompt, one that starts with an unknown task token ("<VQA>how many?"), a region
    task whose input is not one region; otherwise as `split_prompt`.
    """
    if not isinstance(prompt, str) or not prompt.strip():
        raise PromptError(f"A task must be a token, an alias or a prompt, not {prompt!r}.")
    task, given = split_prompt(prompt, text)
    if task is None and (unknown := _TOKEN.match(prompt)):
        raise unknown_task(unknown.group())
    if task is not None and task.takes == "region" and not _is_region(given):
        raise PromptError(
            f"Task {task.token} needs a region, a box in pixels or four location tokens (left, top, right, bottom, 0 "
            f"to {NUM_BINS - 1}) such as <loc_52><loc_332><loc_932><loc_774>, but got {given!r}."
        )
    return task, given


def _is_region(given: str) -> bool:
    found = _REGION.fullmatch(given)
    if found is None:
        return False
    x1, y1, x2, y2 = (int(bin) for bin in found.groups())
    return x1 <= x2 < NUM_BINS and y1 <= y2 < NUM_BINS


def unknown_task(token: str) -> PromptError:
    """The error for a token that names no task."""
    return PromptError(
        f"{token} is no task of this model. Known tasks: {', '.join(_TASKS)}. "
        "A fine-tune's own is added with florence2.register_task; the published weights answer no free questions."
    )


def _should(takes: TaskInput) -> str:
    return "not contain" if takes == "nothing" else "contain"
