"""The tasks that Florence-2 was trained on, and how a task and its input become a prompt.

A user writes a task's token; the model reads its sentence. The model was trained on these sentences, so their wording
must not change.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, cast, get_args

from florence2.errors import PromptError, shown
from florence2.inputs.checks.names import TASK_TOKEN, TOKEN, is_one_word, leading_token, names_a_task, unknown_task
from florence2.inputs.coordinates import NUM_BINS

TaskInput = Literal["nothing", "text", "region", "anything"]
AnswerKind = Literal["text", "boxes", "proposals", "phrases", "quads", "polygons", "boxes_or_polygons"]


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        token: The name in angle brackets, such as "<OD>".
        sentence: The prompt for the model, with "{input}" at the place of the user's input. One that begins with the
            token itself, such as "<VQA>{input}", passes the user's prompt on unchanged (see `token_task`).
        answer: How the generated text is read: as "text", "boxes" with labels, "proposals" (boxes without labels),
            "phrases" (boxes, without phrases such as "it" or "the image"), "quads", "polygons" or
            "boxes_or_polygons".
        takes: The input: "nothing", "text", "region" (four location tokens), or "anything" (any of these).
    """

    token: str
    sentence: str
    answer: AnswerKind = "text"
    takes: TaskInput = "nothing"

    @property
    def alias(self) -> str:
        """The token without brackets in lower case, for command lines: `ocr_with_region`."""
        return self.token.strip("<>").lower()

    @property
    def keeps_token(self) -> bool:
        """Whether the model reads the token itself: the prompt is passed on unchanged, without a sentence."""
        return self.sentence.startswith(self.token)

    def is_named_by(self, prompt: str) -> bool:
        """Return whether a prompt is the alias or holds the token, which must come first where the model reads it."""
        return prompt == self.alias or (prompt.startswith(self.token) if self.keeps_token else self.token in prompt)

    def input_of(self, prompt: str) -> str:
        """Return the part of a prompt that is the input."""
        if prompt == self.alias:
            return ""
        return prompt.removeprefix(self.token) if self.keeps_token else prompt.replace(self.token, "")

    def problems(self) -> list[str]:
        """Return a sentence, without its full stop, for each value that cannot be used."""
        found = []
        if len(self.token) > _LONGEST_TOKEN or not TASK_TOKEN.fullmatch(self.token):
            found.append(
                f"a task token must be a word of at most {_LONGEST_TOKEN} characters in angle brackets, such as "
                f"'<COUNT>', not {shown(self.token)}"
            )
        for name, kinds in (("answer", get_args(AnswerKind)), ("takes", get_args(TaskInput))):
            if getattr(self, name) not in kinds:
                found.append(f"{name} must be one of {', '.join(kinds)}, not {getattr(self, name)!r}")
        if not self.sentence.strip():
            found.append("the sentence is empty; write the prompt that the model reads")
        elif (self.takes != "nothing") != ("{input}" in self.sentence):
            verb = "not contain" if self.takes == "nothing" else "contain"
            found.append(f"the task takes {self.takes}, so its sentence must {verb} '{{input}}': {self.sentence!r}")
        return found


def _region(token: str, sentence: str, answer: AnswerKind = "text") -> Task:
    return Task(token, sentence, answer, "region")


# If a prompt contains two task tokens, the first in this order counts, which is the reference's.
_PUBLISHED: dict[str, Task] = {
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
_TASKS = dict(_PUBLISHED)
TASKS: Mapping[str, Task] = MappingProxyType(_TASKS)
"""The tasks of every model by token: the fifteen published ones, then those added by `register_task`."""

_LONGEST_TOKEN = 64
_REGION = re.compile(r"\s*" + r"<loc_(0|[1-9][0-9]{0,2})>" * 4 + r"\s*")  # as the tokens are spelt, or they are none


class FreePrompt(str):
    """A prompt that the model reads unchanged, even where it is one word or looks like a task.

    Prompts of several words need it only where they contain a task's token or are the name of a task:
    `f.run(FreePrompt("object detection"), image)`.
    """

    __slots__ = ()


class TaskTable(Mapping[str, Task]):
    """The tasks of one model by token: those of `TASKS`, then the model's own. Immutable.

    A task that `register_task` adds later is in the table too; where the model has one of the same token, the model's
    own counts.

    Attributes:
        own: The tasks that belong to the model, as `tasks.json` of its folder holds them.
    """

    def __init__(self, own: Iterable[Task] = ()):
        """Check the tasks of a model.

        Raises PromptError for values that cannot be used, for a token that occurs twice with different meanings, and
        for one that a published task has.
        """
        given = list(own) if isinstance(own, Iterable) else [own]
        if wrong := [task for task in given if not _is_task(task)]:
            raise PromptError(f'{shown(wrong[0])} is not a Task; write Task("<COUNT>", "How many things?").')
        self.own = tuple(dict.fromkeys(given))
        problems = [f"Task {task.token}: {problem}" for task in self.own for problem in task.problems()]
        problems += _clashes(self.own)
        if problems:
            raise PromptError("; ".join(problems) + ".")
        self._own = {task.token: task for task in self.own}

    def __getitem__(self, token: str) -> Task:
        task = self._own.get(token)
        return _TASKS[token] if task is None else task

    def __iter__(self) -> Iterator[str]:
        return iter({**_TASKS, **self._own})

    def __len__(self) -> int:
        return len(_TASKS.keys() | self._own.keys())

    def declared(self, tasks: Iterable[Task]) -> "TaskTable":
        """Return a table with further tasks; one whose token is known already must have the same kind of answer.

        Raises PromptError where the kinds differ, and as `__init__`.
        """
        further: list[Task] = []
        for task in tasks:
            known = self.get(task.token)
            if known is not None and known.answer != task.answer:
                raise PromptError(
                    f"Task {task.token} of this model answers with {known.answer}, but is declared with "
                    f"{task.answer}; leave out the declaration."
                )
            further += [task] if known is None else []
        return TaskTable((*self.own, *further)) if further else self

    def __repr__(self) -> str:
        return f"TaskTable({', '.join(self)})"


def _is_task(value: object) -> bool:
    """Return whether a value is a Task whose fields are texts."""
    return isinstance(value, Task) and all(isinstance(field, str) for field in vars(value).values())


def _clashes(own: Iterable[Task]) -> list[str]:
    """Return a sentence for each task whose token or alias means something else already."""
    known, problems = dict(_PUBLISHED), []
    aliases = {task.alias: task.token for task in known.values()}
    for task in own:
        if known.setdefault(task.token, task) != task:
            sentence = known[task.token].sentence
            problems.append(f"Task {task.token} already exists with the sentence {sentence!r}; choose another token")
        elif aliases.setdefault(task.alias, task.token) != task.token:
            problems.append(f"Task {task.token} has the same alias, {task.alias}, as {aliases[task.alias]}; rename it")
    return problems


def register_task(token: str, sentence: str, answer: AnswerKind = "text", takes: TaskInput | None = None) -> Task:
    """Add a task to every model for the rest of the process.

    A task that belongs to one model, and is saved with it, is added by `florence2.add_tasks`.

    Args:
        token: A name in angle brackets, such as "<COUNT>".
        sentence: The prompt for the model, with "{input}" at the place of the user's input.
        answer: How the generated text is read; see `Task`.
        takes: The input. The default is "text" when the sentence contains "{input}", otherwise "nothing".

    Returns:
        The task. Registering an equal task again returns it unchanged.

    Raises:
        PromptError: The token is malformed or belongs to another task, `answer` or `takes` is unknown, or the
            sentence and `takes` contradict each other.
    """
    task = Task(token, sentence, answer, takes or default_input(sentence))
    if problems := task.problems():
        raise PromptError(f"Task {token}: {'; '.join(problems)}.")
    if _TASKS.get(token, task) != task:
        raise PromptError(
            f"Task {token} already exists with the sentence {_TASKS[token].sentence!r}; choose another token."
        )
    _TASKS[token] = task
    return task


def token_task(token: str, answer: AnswerKind = "text", takes: TaskInput = "anything") -> Task:
    """Return a task without a sentence: the model reads the token and whatever follows it.

    Fine-tunes bring such tasks, "<VQA>What colour is it?" or "<GENERATE_TAGS>"; the reference passes these prompts on
    unchanged, too.

    Args:
        token: A name in angle brackets, such as "<VQA>".
        answer: How the generated text is read; see `Task`.
        takes: What may follow the token; see `Task`.
    """
    return Task(token, token if takes == "nothing" else f"{token}{{input}}", answer, takes)


def parse_task_kind(text: str) -> Task:
    """Read NAME=KIND, such as VQA=text, as a task without a sentence. Raises PromptError for anything else."""
    name, equals, kind = text.partition("=")
    if not equals:
        raise PromptError(f"{shown(text)} is not NAME=KIND; give a task and its kind of answer, such as VQA=text.")
    task = token_task(name if name.startswith("<") else f"<{name}>", cast(AnswerKind, kind))
    if problems := task.problems():
        raise PromptError(f"{shown(text)}: {'; '.join(problems)}.")
    return task


def default_input(sentence: str) -> TaskInput:
    """Return the input of a task that states none: "text" when the sentence has a place for it."""
    return "text" if "{input}" in sentence else "nothing"


def find_task(prompt: str, tasks: Mapping[str, Task] = TASKS) -> Task | None:
    """Return the task of `tasks` whose token is in `prompt` or whose alias equals it; None for a free prompt."""
    if isinstance(prompt, FreePrompt):
        return None
    for task in tasks.values():
        if task.is_named_by(prompt):
            return task
    return None


def split_prompt(prompt: str, text: str | None = None, tasks: Mapping[str, Task] = TASKS) -> tuple[Task | None, str]:
    """Split a prompt into its task and the task's input.

    Args:
        prompt: A task token, an alias or a free prompt. The input may follow a token in the same string.
        text: The input, where it does not follow the token.
        tasks: The tasks of the model by token.

    Returns:
        (task, input), or (None, prompt) for a free prompt.

    Raises:
        PromptError: The prompt is not a string, or only an unknown task token, or the input is missing, superfluous or
            given twice.
    """
    if not isinstance(prompt, str):
        raise PromptError(f"The task is {shown(prompt)}, not a string; the task comes before the image.")
    task = find_task(prompt, tasks)
    if task is None:
        if TOKEN.fullmatch(prompt) and not isinstance(prompt, FreePrompt):
            raise unknown_task(prompt, tasks)
        if text:
            raise PromptError(
                f"A prompt without a task token takes no separate input, but got {shown(text)}; put it into the prompt."
            )
        return None, prompt
    rest = task.input_of(prompt)
    if text is not None and rest:
        raise PromptError(
            f"Task {task.token} got its input twice: {shown(rest)} in the prompt and {shown(text)} as text."
        )
    task_input = text if text is not None else rest
    if task.takes == "nothing" and task_input:
        raise PromptError(f"Task {task.token} takes no input, but got {shown(task_input)}; leave it out.")
    if task.takes in ("text", "region") and not task_input.strip():
        needed = "a region: a box in pixels, or four location tokens" if task.takes == "region" else "a text"
        raise PromptError(f"Task {task.token} needs {needed}.")
    return task, task_input


def build_sentence(task: Task | None, task_input: str) -> str:
    """Return the prompt for the model. Without a task it is the input itself."""
    return task_input if task is None else task.sentence.replace("{input}", task_input)


def check_prompt(prompt: str, text: str | None = None, tasks: Mapping[str, Task] = TASKS) -> tuple[Task | None, str]:
    """Split a prompt as `split_prompt` does, and refuse what the reference accepts but no model was trained to read.

    Args:
        prompt: As for `split_prompt`.
        text: As for `split_prompt`.
        tasks: As for `split_prompt`.

    Raises:
        PromptError: The prompt is empty; is one word ("detect"), names a task in words ("detailed caption") or begins
            with an unknown token ("<VQA>how many?", "<od>"), and is not a `FreePrompt`; the input of a region task is
            not one region; or `split_prompt` refuses it.
    """
    if isinstance(prompt, str) and not prompt.strip():
        raise PromptError(f"A task must be a token, an alias or a prompt, not {shown(prompt)}.")
    task, task_input = split_prompt(prompt, text, tasks)
    if task is None and not isinstance(prompt, FreePrompt):
        if token := leading_token(prompt):
            if token in tasks:  # a token that the model reads itself must be the first thing it reads
                raise PromptError(f"{token} must be the first thing in the prompt; remove the space before it.")
            raise unknown_task(token, tasks)
        if is_one_word(prompt) or names_a_task(prompt, tasks):
            raise unknown_task(prompt, tasks)
    if task is not None and task.takes == "region" and not _is_region(task_input):
        raise PromptError(
            f"Task {task.token} needs a region, a box in pixels or four location tokens (left, top, right, bottom, 0 "
            f"to {NUM_BINS - 1}) such as <loc_52><loc_332><loc_932><loc_774>, but got {shown(task_input)}."
        )
    return task, task_input


def _is_region(task_input: str) -> bool:
    match = _REGION.fullmatch(task_input)
    if match is None:
        return False
    x1, y1, x2, y2 = (int(bin) for bin in match.groups())
    return x1 <= x2 < NUM_BINS and y1 <= y2 < NUM_BINS
