"""`florence2 cascade IMAGE...`: caption each image, find the caption's phrases in it, and outline each phrase."""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from florence2.bulk.rows import Result
from florence2.cli.main import parse_words
from florence2.cli.options import name_argument
from florence2.cli.run import add_answering, answer_all
from florence2.errors import Florence2Error
from florence2.generation.options import GenerationOptions

if TYPE_CHECKING:
    from florence2.pipeline import Detail, EncodedImage, Florence2


@dataclass(frozen=True)
class CascadeQuestion:
    """The whole chain as one question (see `florence2.bulk.rows.Question`)."""

    detail: "Detail" = "short"
    name: ClassVar[str] = "cascade"
    alias: ClassVar[str] = "cascade"

    def to_dict(self) -> dict[str, Any]:
        """Return "task" and "detail"."""
        return {"task": self.name, "detail": self.detail}


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 cascade",
        description="Caption each image, find the caption's phrases in it, and outline what each phrase's box holds.",
    )
    parser.add_argument("images", nargs="+", type=name_argument, metavar="IMAGE", help="files, folders, or - for stdin")
    parser.add_argument(
        "--detail",
        choices=("short", "detailed", "more_detailed"),
        default="short",
        help="length of the caption (default: short)",
    )
    add_answering(parser)
    return parser


def main(arguments: Sequence[str]) -> int:
    """Caption, ground and outline; return the exit code."""
    options = parse_words(build_parser(), arguments)
    return answer_all(options, options.images, [CascadeQuestion(options.detail)], _ask)


def _ask(
    model: "Florence2",
    options: GenerationOptions,
    pairs: "Iterable[tuple[EncodedImage, CascadeQuestion] | Florence2Error]",
    _: int | None,
) -> Iterator[Result | Florence2Error]:
    """Run one chain after the other: each step needs the one before."""
    return (pair if isinstance(pair, Florence2Error) else _run_chain(model, *pair, options) for pair in pairs)


def _run_chain(
    model: "Florence2", image: "EncodedImage", question: CascadeQuestion, options: GenerationOptions
) -> Result | Florence2Error:
    try:
        return model.cascade(image, question.detail, options=options)
    except Florence2Error as error:
        return error
