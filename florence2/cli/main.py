"""The command line: `florence2 run`, `cascade`, `download`, `convert`, `init`, `info`.

Results go to stdout or files, everything else to stderr. Exit codes: 0, 1 when some pictures failed, 2 for a request
that cannot be answered at all, 130 after Ctrl-C, or SIGTERM in a training.
"""

import argparse
import contextlib
import difflib
import json
import os
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from florence2 import __version__
from florence2.bulk.batch import CASCADE, Question, Row, Source, answer_pictures, find_pictures
from florence2.bulk.sinks import Console, Folder, Progress, Sink
from florence2.checkpoints.checkpoint import checkpoint_folder, convert_checkpoint
from florence2.checkpoints.describe import describe_checkpoint
from florence2.checkpoints.hub import DEFAULT_MODEL, NAMES, download, resolve, resolve_adapter
from florence2.checkpoints.presets import init_checkpoint, preset
from florence2.cli.extras import EXTRAS, run_extra
from florence2.devices import DTYPES
from florence2.errors import Florence2Error, PromptError
from florence2.generation.options import GenerationOptions
from florence2.inputs.processor import TaskText, input_to_text
from florence2.inputs.tasks import TASKS, check_prompt, find_task
from florence2.pipeline import Florence2, load

EXIT_SOME_FAILED, EXIT_USAGE, EXIT_STOPPED = 1, 2, 130
_ANY_REGION = "<loc_0>" * 4  # stands for a box until the size of its picture is known


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    for stream in (sys.stdout, sys.stderr):  # None where the shell closed them
        if hasattr(stream, "reconfigure"):  # a label the terminal cannot show must not end the run
            stream.reconfigure(errors="backslashreplace")
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        if words and words[0] in EXTRAS:
            return run_extra(words[0], words[1:])
        options = build_parser().parse_args(words)
        code: int = options.command(options)
        print(end="", flush=True)
        return code
    except (Florence2Error, OSError) as error:
        if isinstance(error, BrokenPipeError):  # whoever read our output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        print(f"florence2: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("\nflorence2: stopped.", file=sys.stderr)
        return EXIT_STOPPED


def build_parser() -> argparse.ArgumentParser:
    """The whole grammar of the command line."""
    parser = argparse.ArgumentParser(prog="florence2", description="Captions, boxes, outlines and text from pictures.")
    parser.add_argument("--version", action="version", version=f"florence2 {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_run(commands)
    _add_cascade(commands)
    _add_download(commands)
    _add_convert(commands)
    _add_init(commands)
    _add_info(commands)
    for name, extra in EXTRAS.items():  # listed here; each has a grammar of its own
        commands.add_parser(name, help=f"{extra.help} (florence2[{extra.extra}])", add_help=False)
    return parser


def _add_run(commands: Any) -> None:
    names = ", ".join(task.alias for task in TASKS.values())
    command = commands.add_parser(
        "run",
        help="answer tasks on pictures",
        description=f"Answer one task or more on pictures. Tasks: {names}; or a free prompt. "
        'Example: florence2 run "<OD>" photo.jpg',
    )
    command.add_argument(
        "arguments", nargs="+", metavar="TASK... PICTURE...", help="tasks first, then files, folders, or -"
    )
    command.add_argument("--text", action="append", help="the task's input; several times for several classes")
    command.add_argument(
        "--box",
        metavar="X1,Y1,X2,Y2",
        type=_parse_box,
        help="the task's region, in pixels (--box=-5,... if negative)",
    )
    _add_work_options(command)
    command.set_defaults(command=_run)


def _add_cascade(commands: Any) -> None:
    command = commands.add_parser(
        "cascade", help="caption pictures, find the caption's phrases, outline each", description=_cascade.__doc__
    )
    command.add_argument("arguments", nargs="+", metavar="PICTURE", help="files, folders, or -")
    command.add_argument("--detail", choices=("short", "detailed", "more_detailed"), default="short")
    _add_work_options(command)
    command.set_defaults(command=_cascade)


def _add_work_options(command: argparse.ArgumentParser) -> None:
    known = ", ".join(NAMES)
    command.add_argument(
        "--model", default=DEFAULT_MODEL, help=f"{known}, OWNER/NAME, a folder or a file ({DEFAULT_MODEL})"
    )
    command.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    command.add_argument("--adapter", metavar="DIR", help="a LoRA adapter for the model, a folder or OWNER/NAME")
    command.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (auto)")
    command.add_argument("--dtype", default="auto", choices=("auto", *DTYPES), help="type of the weights (auto)")
    command.add_argument(
        "--attention", default="sdpa", choices=("sdpa", "eager"), help="torch's kernel, or written out (sdpa)"
    )
    command.add_argument("--beams", type=int, help="beams of the search, 1 for greedy (the model's own setting)")
    command.add_argument("--max-new-tokens", type=int, help="limit of an answer's length (the model's own setting)")
    command.add_argument("--batch", type=int, default=1, help="pictures computed at once (1)")
    command.add_argument("--json", action="store_true", help="JSON Lines instead of text on stdout")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="also write DIR/results.jsonl; what it holds is not done again"
    )
    command.add_argument("--draw", action="store_true", help="also write a picture of each answer to --out")
    _add_pickle(command)


def _add_download(commands: Any) -> None:
    command = commands.add_parser("download", help="fetch a checkpoint from the Hugging Face Hub")
    command.add_argument("model", help=f"{', '.join(NAMES)}, or OWNER/NAME")
    command.add_argument("--revision", help="branch, tag or commit (the main branch)")
    _add_pickle(command)
    command.set_defaults(command=_download)


def _add_convert(commands: Any) -> None:
    command = commands.add_parser("convert", help="rewrite a checkpoint: other layout, other type, .bin to safetensors")
    command.add_argument("source", help="folder, weight file, or name")
    command.add_argument("folder", type=Path, help="where to write")
    command.add_argument("--layout", choices=("microsoft", "native"), default="microsoft")
    command.add_argument("--dtype", choices=tuple(DTYPES), help="type of the weights (as stored)")
    command.add_argument("--adapter", metavar="DIR", help="a LoRA adapter to merge, a folder or OWNER/NAME")
    _add_pickle(command)
    command.set_defaults(command=_convert)


def _add_init(commands: Any) -> None:
    command = commands.add_parser("init", help="write an untrained checkpoint, for tests and benchmarks")
    command.add_argument("folder", type=Path)
    command.add_argument("--preset", choices=("tiny", "base", "large"), default="base")
    command.add_argument("--tokenizer", required=True, help="folder or name of a checkpoint to take the tokenizer from")
    command.add_argument("--dtype", choices=tuple(DTYPES), default="float16")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(command=_init)


def _add_info(commands: Any) -> None:
    command = commands.add_parser("info", help="say what a checkpoint holds")
    command.add_argument("checkpoint", help="folder, weight file, or name")
    command.add_argument("--json", action="store_true")
    _add_pickle(command)
    command.set_defaults(command=_info)


def _add_pickle(command: argparse.ArgumentParser) -> None:
    command.add_argument("--allow-pickle", action="store_true", help="read a .bin where there are no safetensors")


def _run(options: argparse.Namespace) -> int:
    tasks, pictures = _split_arguments(options.arguments)
    text: TaskText = options.text[0] if options.text and len(options.text) == 1 else options.text
    questions = [_question(task, text, options.box) for task in tasks]
    for option, given in (("--text", text), ("--box", options.box)):
        if given and all(question.text != given for question in questions):
            raise PromptError(f"None of the tasks {', '.join(tasks)} takes {option}; leave it out.")
    return _work(options, pictures, questions)


def _cascade(options: argparse.Namespace) -> int:
    """Caption each picture, find the caption's phrases in it, and outline what each phrase's box holds."""
    return _work(options, options.arguments, [Question(CASCADE, detail=options.detail)])


def _work(options: argparse.Namespace, pictures: Sequence[str], questions: Sequence[Question]) -> int:
    if options.draw and options.out is None:
        raise Florence2Error("--draw needs --out DIR to say where the drawn pictures go.")
    if options.batch < 1:
        raise Florence2Error(f"--batch is {options.batch}; it must be at least 1.")
    sources = find_pictures(pictures)
    with contextlib.ExitStack() as stack:
        folder = None
        if options.out is not None:
            folder = stack.enter_context(Folder(options.out, options.draw, _settings(options)))
        return _answer(options, sources, questions, folder)


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    """What every answer of a run depends on beside picture and question."""
    names = ("revision", "dtype", "attention", "beams", "max_new_tokens")
    model = options.model if options.model in NAMES else _absolute(options.model)
    adapter = _absolute(options.adapter) if options.adapter else None
    return {"model": model, "adapter": adapter} | {name: getattr(options, name) for name in names}


def _absolute(name: str) -> str:
    """A path that exists, whole; a name on the Hub as it is."""
    return str(Path(name).absolute()) if Path(name).exists() else name


def _answer(
    options: argparse.Namespace, sources: Sequence[Source], questions: Sequence[Question], folder: Folder | None
) -> int:
    model = load(
        options.model,
        device=options.device,
        dtype=options.dtype,
        revision=options.revision,
        attention=options.attention,
        allow_pickle=options.allow_pickle,
        adapter=options.adapter,
        report=_tell,
    )
    search = _search_options(model, options)
    console = Console(options.json, headings=len(sources) * len(questions) > 1)
    if folder is None:
        return _report(answer_pictures(model, sources, questions, search, options.batch), [console], len(sources))
    if folder.done:
        print(f"florence2: {options.out}/results.jsonl already holds {len(folder.done)} answers.", file=sys.stderr)
    rows = answer_pictures(model, sources, questions, search, options.batch, folder.done)
    return _report(rows, [console, folder], len(sources), kept=f"; what is done is kept in {options.out}")


def _report(rows: Iterable[Row], sinks: Sequence[Sink], total: int, kept: str = "") -> int:
    """Hand every row to every sink as it comes, and show how far the work is."""
    failed, progress = 0, Progress(total)
    seen: set[str] = set()
    try:
        for row in rows:
            for sink in sinks:
                sink(row)
            failed += row.error is not None
            seen.add(row.source.name)
            progress.show(len(seen))
    except KeyboardInterrupt:
        print(f"\nflorence2: stopped after {len(seen)} of {total} pictures{kept}.", file=sys.stderr)
        return EXIT_STOPPED
    finally:
        progress.close()
    return EXIT_SOME_FAILED if failed else 0


def _search_options(model: Florence2, options: argparse.Namespace) -> GenerationOptions:
    changes = {"num_beams": options.beams, "max_new_tokens": options.max_new_tokens}
    return model.options(**{name: value for name, value in changes.items() if value is not None})


def _split_arguments(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """The first argument is a task or prompt; so is every next one that names a task, up to the first that does not."""
    count = 1
    while count < len(arguments) and _is_task(arguments[count]):
        count += 1
    if count == len(arguments):
        raise PromptError("Which picture? Give files, folders, or - for stdin, after the task.")
    return list(arguments[:count]), list(arguments[count:])


def _is_task(argument: str) -> bool:
    found = find_task(argument)
    return found is not None and argument in (found.token, found.alias) and not Path(argument).exists()


def _question(task: str, text: TaskText, box: tuple[float, ...] | None) -> Question:
    """The task with the input that it takes; raises PromptError before a model is loaded for it."""
    found = find_task(task)
    if found is None and re.fullmatch(r"\w+", task) and (near := _near(task)):
        raise PromptError(f"There is no task {task!r}; did you mean {near}? A free prompt is more than one word.")
    whole = found is None or task in (found.token, found.alias)  # otherwise the input is in the same string
    if found is None or found.takes == "nothing" or not whole:
        check_prompt(task)
        return Question(task)
    if found.takes == "region" and box is not None:
        check_prompt(task, _ANY_REGION)
        return Question(task, box)
    check_prompt(task, input_to_text(text))
    return Question(task, text)


def _near(word: str) -> str | None:
    """The alias that `word` may be a misspelling of."""
    found = difflib.get_close_matches(word.lower(), [task.alias for task in TASKS.values()], n=1, cutoff=0.75)
    return found[0] if found else None


def _parse_box(text: str) -> tuple[float, ...]:
    try:
        x1, y1, x2, y2 = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be four numbers X1,Y1,X2,Y2 in pixels") from None
    return (x1, y1, x2, y2)


def _tell(line: str) -> None:
    print(line, file=sys.stderr)


def _download(options: argparse.Namespace) -> int:
    print(download(options.model, options.revision, allow_pickle=options.allow_pickle, report=_tell))
    return 0


def _convert(options: argparse.Namespace) -> int:
    source = resolve(options.source, allow_pickle=options.allow_pickle, report=_tell)
    dtype = DTYPES[options.dtype] if options.dtype else None
    adapter = resolve_adapter(options.adapter) if options.adapter else None
    convert_checkpoint(source, options.folder, options.layout, dtype, options.allow_pickle, adapter)
    print(options.folder)
    return 0


def _init(options: argparse.Namespace) -> int:
    tokenizer = checkpoint_folder(resolve(options.tokenizer, report=_tell))
    init_checkpoint(options.folder, preset(options.preset), tokenizer, options.seed, DTYPES[options.dtype])
    print(options.folder)
    return 0


def _info(options: argparse.Namespace) -> int:
    described = describe_checkpoint(
        resolve(options.checkpoint, allow_pickle=options.allow_pickle, report=_tell), options.allow_pickle
    )
    if options.json:
        print(json.dumps(described))
        return 0
    for key, value in described.items():
        if key == "files":
            for file in value:
                print(f"{file['name']}: {file['bytes']:,} bytes, sha256 {file['sha256']}")
        elif isinstance(value, dict):
            print(f"{key}:")
            for name, part in value.items():
                print(f"  {name}: {_as_text(part)}")
        else:
            print(f"{key}: {value}")
    return 0


def _as_text(value: Any) -> str:
    """A number with its thousands apart, a text as it is, anything else as its JSON file has it."""
    if type(value) is int:
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)
