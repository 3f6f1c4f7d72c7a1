"""The command line: commands, dispatch, exit codes, and errors as sentences.

Results go to stdout or files, everything else to stderr. Exit codes: 0; 1 when something that was requested is missing
from the results, such as the answer about an image that cannot be read; 2 for a request that cannot be answered at all;
130 after Ctrl-C or SIGTERM. `florence2.__main__` calls `main` with signals and streams in order.
"""

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from florence2 import __version__
from florence2.errors import ConfigError, Florence2Error, OptionError

EXIT_INCOMPLETE, EXIT_USAGE, EXIT_STOPPED = 1, 2, 130
_PLAIN = "\0"  # marks a word that is not an option, as no word of a shell can hold this character


@dataclass(frozen=True)
class Command:
    """One command: a module with `build_parser()` and `main(arguments) -> exit code`, imported when it is called.

    `extra` names the optional dependencies that it needs.
    """

    module: str
    help: str
    extra: str | None = None


COMMANDS = {
    "run": Command("florence2.cli.run", "answer tasks on images"),
    "cascade": Command("florence2.cli.cascade", "caption images, find the caption's phrases, outline each"),
    "label": Command("florence2.label.command", "answer tasks on any number of images, resumably, into a folder"),
    "dataset": Command("florence2.dataset.command", "write answers as a dataset: COCO, YOLO, captions, ..."),
    "download": Command("florence2.cli.download", "fetch a checkpoint from the Hugging Face Hub"),
    "convert": Command("florence2.cli.convert", "rewrite a checkpoint: layout, type, .bin to safetensors"),
    "init": Command("florence2.cli.init", "write an untrained checkpoint, for tests and benchmarks"),
    "info": Command("florence2.cli.info", "describe a checkpoint"),
    "serve": Command("florence2.serve.command", "answer requests over HTTP, as OpenAI's API and with a page", "serve"),
    "train": Command("florence2.train.command", "fine-tune a checkpoint on images with questions and answers", "train"),
    "evaluate": Command("florence2.evaluate.command", "measure a checkpoint on a benchmark or a data file", "train"),
    "calibrate": Command("florence2.train.calibrate_command", "let a checkpoint's confidences be frequencies", "train"),
    "export": Command("florence2.export.command", "write a model as ONNX graphs for other runtimes", "export"),
    "audit": Command("florence2.inspect.audit.command", "measure a checkpoint's tensors, or compare two", "inspect"),
    "mcp": Command("florence2.mcp.command", "offer a model to an assistant as tools that look at images", "mcp"),
    "inspect": Command("florence2.inspect.command", "answer one task on one image and show why", "inspect"),
}


def main(
    arguments: Sequence[str] | None = None,
    commands: Mapping[str, Command] = COMMANDS,
    program: str = "florence2",
    backend: Any = None,
) -> int:
    """Run one command.

    Args:
        arguments: The words after the program's name; None takes those of this process.
        commands: The commands by their names.
        program: How the command line is called.
        backend: What the commands' own `main` is given in addition, if anything.

    Returns:
        The exit code.

    Raises:
        SystemExit: After --help and --version, and for words that do not fit the grammar.
    """
    for stream in (sys.stdout, sys.stderr):  # None where the shell closed them
        if hasattr(stream, "reconfigure"):  # a label the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        try:
            return run_command(words, commands, program, backend)
        finally:
            print(end="", flush=True)  # also after --help, which ends in a SystemExit
    except BrokenPipeError:  # the reader of our output has seen enough
        return 0
    except (Florence2Error, OSError) as error:
        print(f"florence2: {error_sentence(error)}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\nflorence2: stopped.", file=sys.stderr)
        return EXIT_STOPPED


def error_sentence(error: Exception) -> str:
    """Return the message of an error; an OSError names its file and the reason."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename} cannot be used: {error.strerror}."
    return str(error)


def run_command(words: Sequence[str], commands: Mapping[str, Command], program: str, backend: Any) -> int:
    """Run the command that the first word names; return its exit code."""
    if not words or words[0] not in commands:
        parser = build_parser(commands, program)
        parser.parse_args(words)  # exits after help, the version or an error
        parser.error("the command must come first")
    command = commands[words[0]]
    given = () if backend is None else (backend,)
    with require_extra(command.extra, f"`{program} {words[0]}`"):
        code: int = importlib.import_module(command.module).main(words[1:], *given)
    return code


def build_parser(commands: Mapping[str, Command] = COMMANDS, program: str = "florence2") -> argparse.ArgumentParser:
    """Return the grammar in front of the commands' own: help, version, and the list of commands."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Captions, boxes, outlines and text from images.",
        epilog=f"{program} COMMAND --help lists the options of a command.",
    )
    parser.add_argument("--version", action="version", version=f"florence2 {__version__}")
    known = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, command in commands.items():
        extra = f" (needs the extra {command.extra})" if command.extra else ""
        known.add_parser(name, help=command.help + extra, add_help=False)
    return parser


def parse_words(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    """Parse the words of a command whose options may stand anywhere; after "--" no word is an option.

    argparse itself takes all words of a list from one place. Its way to gather them forgets a "--".
    """
    cut = words.index("--") if "--" in words else len(words)
    options = parser.parse_intermixed_args([*words[:cut], *(_PLAIN + word for word in words[cut + 1 :])])
    for name, value in vars(options).items():
        if isinstance(value, list):
            setattr(options, name, [item.removeprefix(_PLAIN) if isinstance(item, str) else item for item in value])
        elif isinstance(value, str):
            setattr(options, name, value.removeprefix(_PLAIN))
    return options


def name_options(message: str, options: Mapping[str, str]) -> str:
    """Return a message about settings with the names of their options, given by the settings' names, in their place."""
    for setting, option in options.items():
        # `sample=True` is --sample, `num_beams=1` is --beams 1, and `top_k` alone is --top-k
        message = re.sub(rf"(?<![\w-]){setting}=(?!True\b)", f"{option} ", message)
        message = re.sub(rf"(?<![\w-]){setting}(=True)?\b", option, message)
    return message.replace(", or None", "")  # an option is left out instead


@contextmanager
def naming_options(options: Mapping[str, str]) -> Iterator[None]:
    """Let errors about settings name options, as `name_options` does."""
    try:
        yield
    except (OptionError, ConfigError) as error:
        raise type(error)(name_options(str(error), options)) from None


@contextmanager
def require_extra(extra: str | None, user: str) -> Iterator[None]:
    """Turn a missing package into an OptionError that says how to install the `extra` that `user` needs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if extra is None or (error.name or "").startswith("florence2"):
            raise
        raise OptionError(
            f"{user} needs the package {error.name}, which is not installed; in a checkout of this project: "
            f'pip install ".[{extra}]"'
        ) from None
