"""Recognise prompts that name a task in another way than its token or alias, and say which task is nearest.

The published models answer tasks, not questions: "detailed caption" read as a free prompt gives a poor answer without a
sign. A sentence stays a free prompt.
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping
from typing import TYPE_CHECKING

from florence2.errors import PromptError, shown

if TYPE_CHECKING:
    from florence2.inputs.tasks import Task

TOKEN = re.compile(r"<[A-Z][A-Z0-9_]*>")
# the tokens of locations and of sentences have a meaning of their own in every prompt
TASK_TOKEN = re.compile(r"<(?!(?:loc_[0-9]+|s|pad|unk|mask)>)[A-Z][\w-]*>", re.ASCII | re.IGNORECASE)
_OPENING, _CLOSING = "<\uff1c\u2039\u27e8\u3008", ">\uff1e\u203a\u27e9\u3009"  # with those that look like them
# a letter comes first: "<3 cats>" and "< 5" are words; location tokens and BART's own mean something in every prompt
_LIKE_A_TOKEN = re.compile(
    rf"\s*[{_OPENING}](?!(?:loc_[0-9]+|s|pad|unk|mask)[{_CLOSING}])[A-Za-zＡ-Ｚａ-ｚ][^{_OPENING}{_CLOSING}?？]*[{_CLOSING}]"
)
_LONGEST_NAME = 60  # characters
_FIRST_WITHOUT_SPACES = "\u0e00"  # from Thai on, scripts write sentences without spaces
_OTHER_NAMES = {
    "<OD>": "detect, detection, object detection, object detector",
    "<CAPTION>": "captioning, image caption, image captioning, short caption, brief caption",
    "<DETAILED_CAPTION>": "describe, description, detailed captioning, detailed description, long caption",
    "<MORE_DETAILED_CAPTION>": "more detailed captioning, more detailed description, very detailed caption, paragraph",
    "<DENSE_REGION_CAPTION>": "dense caption, dense captioning, region caption, dense region captioning, "
    "caption with region, region captioning",
    "<REGION_PROPOSAL>": "object proposal, proposal",
    "<CAPTION_TO_PHRASE_GROUNDING>": "ground, grounding, phrase grounding, caption grounding, visual grounding, "
    "caption to grounding",
    "<REFERRING_EXPRESSION_SEGMENTATION>": "segment, segmentation, image segmentation, instance segmentation, "
    "referring segmentation, referring expression",
    "<REGION_TO_SEGMENTATION>": "region segmentation, box to segmentation, region to mask, box to mask",
    "<OPEN_VOCABULARY_DETECTION>": "open vocabulary object detection, open vocab detection, open vocabulary, ovd",
    "<REGION_TO_CATEGORY>": "region category, region classification, box to category",
    "<REGION_TO_DESCRIPTION>": "region description, box to description, region to caption",
    "<OCR>": "read, text, text recognition, optical character recognition",
    "<OCR_WITH_REGION>": "text detection, ocr with boxes, ocr with bounding boxes, region ocr",
    "<REGION_TO_OCR>": "region to text, box to ocr",
}
"""Names of the published tasks that are not near their aliases."""


def names_a_task(prompt: str, tasks: "Mapping[str, Task]") -> bool:
    """Return whether a prompt is the name of a task in words, such as "Detailed caption"."""
    singular = {_key(name).removesuffix("s") for name in _names(tasks)}
    return len(prompt) <= _LONGEST_NAME and _key(prompt).removesuffix("s") in singular


def is_one_word(prompt: str) -> bool:
    """Return whether a prompt is one word of a script that writes spaces between words."""
    if len(prompt.split()) != 1:
        return False
    letters = [char for char in unicodedata.normalize("NFKC", prompt[:_LONGEST_NAME]) if _is_letter(char)]
    return 2 * sum(char >= _FIRST_WITHOUT_SPACES for char in letters) <= len(letters)


def leading_token(prompt: str) -> str | None:
    """Return the words in angle brackets, full-width ones included, of a prompt that begins with them."""
    match = _LIKE_A_TOKEN.match(prompt)
    return match.group().strip() if match else None


def unknown_task(name: str, tasks: "Mapping[str, Task]") -> PromptError:
    """Return the error for an unknown task: a token, a word, or a name in words."""
    near, is_token = _nearest(name, tasks), name.startswith(tuple(_OPENING))
    own = name.strip("<>") if TASK_TOKEN.fullmatch(name) else "NAME"
    guess = f"; did you mean {near.token if is_token else near.alias}?" if near else "."
    return PromptError(
        f"Unknown task {name if TOKEN.fullmatch(name) else shown(name)}{guess} Known tasks: {', '.join(tasks)}. "
        f"If a fine-tuned model has it, declare it with --task-kind {own}=text (text or another kind of answer), in "
        "Python with florence2.add_tasks. The published models do not answer free questions. A free prompt has more "
        "than one word and is not the name of a task, or is given as florence2.FreePrompt (--free-prompt on the "
        "command line)."
    )


def _nearest(name: str, tasks: "Mapping[str, Task]") -> "Task | None":
    """Return the task whose name is nearest to a misspelt one, if any is near."""
    keys = {_key(known): task for known, task in _names(tasks).items()}
    near = difflib.get_close_matches(_key(name), keys, n=1)
    return keys[near[0]] if near else None


def _names(tasks: "Mapping[str, Task]") -> "dict[str, Task]":
    """Return every name of every task; an alias counts more than another task's other name."""
    names = {
        name: tasks[token] for token, others in _OTHER_NAMES.items() if token in tasks for name in others.split(", ")
    }
    return names | {task.alias: task for task in tasks.values()}


def _key(name: str) -> str:
    """Return a name without case, spaces and punctuation."""
    folded = unicodedata.normalize("NFKC", name[:_LONGEST_NAME]).casefold()
    return "".join(filter(_is_letter, folded))


def _is_letter(char: str) -> bool:
    return unicodedata.category(char)[0] in "LMN"  # letters, their marks, and digits
