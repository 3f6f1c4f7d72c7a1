"""Protocols: the questions about an example. The published description leaves choices open; each has a name."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from florence2.bulk.rows import TaskQuestion
from florence2.evaluate.tables.catalogue import Family
from florence2.evaluate.tables.example import BenchmarkExample, TableError
from florence2.inputs.tasks import FreePrompt

Asking: TypeAlias = Callable[[BenchmarkExample[Any]], TaskQuestion]


@dataclass(frozen=True)
class Protocol:
    """One way to measure a table.

    Attributes:
        name: How the command and the report call it.
        description: The task, and which part of the answer counts.
        asked: The questions about an example, in the order in which the scoring takes their answers.
    """

    name: str
    description: str
    asked: Sequence[Asking]

    def questions(self, example: BenchmarkExample[Any]) -> list[TaskQuestion]:
        """Return the questions about an example."""
        return [ask(example) for ask in self.asked]


def _image(task: str) -> Asking:
    return lambda _: TaskQuestion(task)


def _text(task: str) -> Asking:
    return lambda example: TaskQuestion(task, example.text)


def _prompt(example: BenchmarkExample[Any]) -> TaskQuestion:
    return TaskQuestion(FreePrompt(example.text or ""))


_DETECT, _GROUND = _text("<OPEN_VOCABULARY_DETECTION>"), _text("<CAPTION_TO_PHRASE_GROUNDING>")
_CAPTION = Protocol("caption", "<CAPTION>; Penn Treebank tokens, CIDEr-D", [_image("<CAPTION>")])
_DETAILED = Protocol("detailed", "<DETAILED_CAPTION>; Penn Treebank tokens, CIDEr-D", [_image("<DETAILED_CAPTION>")])
PROTOCOLS: dict[Family, Sequence[Protocol]] = {
    "captions": [_CAPTION, _DETAILED],
    "detection": [Protocol("od", "<OD>; labels to categories by name; 100 boxes an image", [_image("<OD>")])],
    "phrases": [Protocol("grounding", "<CAPTION_TO_PHRASE_GROUNDING>; the first box of each phrase", [_GROUND])],
    "expressions": [
        Protocol("ovd", "<OPEN_VOCABULARY_DETECTION>; the first box, IoU of at least 0.5", [_DETECT]),
        Protocol("ovd-then-grounding", "as ovd; where it gives no box, as grounding", [_DETECT, _GROUND]),
        Protocol("grounding", "<CAPTION_TO_PHRASE_GROUNDING>; the first box, IoU of at least 0.5", [_GROUND]),
    ],
    "masks": [
        Protocol(
            "res",
            "<REFERRING_EXPRESSION_SEGMENTATION>; all outlines filled and joined",
            [_text("<REFERRING_EXPRESSION_SEGMENTATION>")],
        )
    ],
    "questions": [
        Protocol("free-prompt", "the question as a free prompt; not the paper's, which is unpublished", [_prompt])
    ],
}
"""The protocols of each family; the first one is the default, and the one that published results are compared with."""


def find_protocol(family: Family, name: str | None) -> Protocol:
    """Return a protocol of a family; None takes the default. Raises TableError for an unknown one."""
    known: Mapping[str, Protocol] = {protocol.name: protocol for protocol in PROTOCOLS[family]}
    if name is None:
        return PROTOCOLS[family][0]
    if name not in known:
        raise TableError(f"Unknown protocol {name[:60]!r} for {family}. Known protocols: {', '.join(known)}.")
    return known[name]
