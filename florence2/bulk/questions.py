"""The words of a command line as questions: tasks before images, each task with the input that it takes."""

import os
import shlex
from collections.abc import Mapping, Sequence

from florence2.bulk.rows import TaskQuestion
from florence2.errors import PromptError, shown
from florence2.inputs.checks.names import leading_token
from florence2.inputs.processor import TaskText, input_to_text
from florence2.inputs.tasks import TASKS, Task, check_prompt, find_task


def names_task(word: str, tasks: Mapping[str, Task] = TASKS) -> bool:
    """Return whether a word is a task's token or alias, and nothing else."""
    task = find_task(word, tasks)
    return task is not None and word in (task.token, task.alias)


def holds_task(word: str, tasks: Mapping[str, Task] = TASKS) -> bool:
    """Return whether a word is a task, with its input or without: "od", "<VQA>how many?", or an unknown "<X>"."""
    return find_task(word, tasks) is not None or leading_token(word) is not None


def is_path(path: str) -> bool:
    """Return whether a file or folder exists at `path`."""
    return os.path.exists(path)  # noqa: PTH110  Path.exists raises for a prompt that is too long for a path


def check_order(
    command: str, words: Sequence[str], tasks: Mapping[str, Task] = TASKS, program: str = "florence2"
) -> None:
    """Raise PromptError, with the order that works, when an image comes before its task."""
    first = words[0]
    if names_task(first, tasks) or not (first == "-" or is_path(first)):
        return
    task = next((word for word in words[1:] if holds_task(word, tasks)), None)
    if task is not None:
        right = f"{program} {shlex.join([command, task, first])}"
        raise PromptError(f"The arguments are in the wrong order. The task comes before the image: {right}")
    example = f"{program} {shlex.join([command, '<OD>', first])}"
    raise PromptError(f"The first argument must be a task, not {shown(first)}; for example: {example}")


def read_questions(
    tasks: Sequence[str],
    texts: Sequence[str] | None,
    boxes: Sequence[tuple[float, ...]] | None,
    known: Mapping[str, Task] = TASKS,
) -> list[TaskQuestion]:
    """Give each task the input that it takes; a task that takes a region becomes one question for each box.

    `known` holds the tasks of the model. Raises PromptError for an unknown task, a missing input, and an input that no
    task takes.
    """
    text: TaskText = texts[0] if texts and len(texts) == 1 else texts
    asked = (question for task in tasks for question in _questions_of(task, text, boxes or (), known))
    questions: list[TaskQuestion] = []
    for question in asked:
        # asked twice, also as "od" and as "<OD>", it has one answer
        if all(question.to_dict() != other.to_dict() for other in questions):
            questions.append(question)
    inputs = [question.text for question in questions]
    if text and text not in inputs:
        raise _superfluous(tasks, "--text", "--box" if boxes else None)
    if boxes and not any(box in inputs for box in boxes):
        raise _superfluous(tasks, "--box", "--text" if text else None)
    return questions


def _questions_of(
    prompt: str, text: TaskText, boxes: Sequence[tuple[float, ...]], tasks: Mapping[str, Task]
) -> list[TaskQuestion]:
    task = find_task(prompt, tasks)
    if task is None or task.takes == "nothing":
        check_prompt(prompt, tasks=tasks)
        return [TaskQuestion(prompt, None, task)]
    if not names_task(prompt, tasks):  # the input is in the same string
        _, task_input = check_prompt(prompt, tasks=tasks)
        return [TaskQuestion(task.token, task_input, task)]
    if boxes and (task.takes == "region" or (task.takes == "anything" and not text)):
        return [TaskQuestion(prompt, box, task) for box in boxes]
    check_prompt(prompt, input_to_text(text), tasks)
    return [TaskQuestion(prompt, text, task)]


def _superfluous(tasks: Sequence[str], option: str, other: str | None) -> PromptError:
    subject = f"Task {tasks[0]!r} takes no" if len(tasks) == 1 else f"None of the tasks {', '.join(tasks)} takes"
    return PromptError(f"{subject} {option}{f' when {other} is given' if other else ''}; leave it out.")
