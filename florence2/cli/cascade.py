"""`florence2 cascade IMAGE...`: caption each image, find the caption's phrases in it, and outline each phrase."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from florence2.asking.questions import Detail, Runtime
from florence2.asking.requests import EncodedImage
from florence2.bulk.answering import Arrival
from florence2.bulk.rows import Result
from florence2.cli.main import parse_words
from florence2.cli.options.values import name_argument
from florence2.cli.run import TORCH, Backend, add_answering, answer_all
from florence2.errors import Florence2Error
from florence2.generation.options import GenerationOptions


@dataclass(frozen=True)
class CascadeQuestion:
    """The whole chain as one question (see `florence2.bulk.rows.Question`)."""

    detail: Detail = "short"
    name: ClassVar[str] = "cascade"
    alias: ClassVar[str] = "cascade"

    def to_dict(self) -> dict[str, Any]:
        """Return "task" and "detail"."""
        return {"task": self.name, "detail": self.detail}


def build_parser(backend: Backend = TORCH) -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog=f"{backend.program} cascade",
        description="Caption each image, find the caption's phrases in it, and outline what each phrase's box holds.",
    )
    parser.add_argument("images", nargs="+", type=name_argument, metavar="IMAGE", help="files, folders, or - for stdin")
    parser.add_argument(
        "--detail",
        choices=("short", "detailed", "more_detailed"),
        default="short",
        help="length of the caption (default: short)",
    )
    add_answering(parser, backend)
    return parser


def main(arguments: Sequence[str], backend: Backend = TORCH) -> int:
    """Caption, ground and outline; return the exit code."""
    options = parse_words(build_parser(backend), arguments)
    return answer_all(options, options.images, [CascadeQuestion(options.detail)], _ask, backend)


def _ask(
    model: Runtime,
    options: GenerationOptions,
    pairs: Iterable[tuple[EncodedImage, CascadeQuestion] | Florence2Error],
    _: int | None,
    __: Arrival,  # each row is yielded when it is known
) -> Iterator[Result | Florence2Error]:
    """Run one chain after the other: each step needs the one before."""
    return (pair if isinstance(pair, Florence2Error) else _run_chain(model, *pair, options) for pair in pairs)


def _run_chain(
    model: Runtime, image: EncodedImage, question: CascadeQuestion, options: GenerationOptions
) -> Result | Florence2Error:
    try:
        return model.cascade(image, question.detail, options=options)
    except Florence2Error as error:
        return error
