"""`florence2 evaluate`: measure a checkpoint on tables of published benchmarks, or on a data file."""

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from florence2.cli.main import EXIT_INCOMPLETE, parse_words, require_extra
from florence2.cli.options.arguments import check_at_least, generation_changes, say
from florence2.cli.options.groups import add_background, add_calibration
from florence2.cli.options.values import name_argument, path_argument
from florence2.cli.run import TORCH
from florence2.errors import OptionError
from florence2.evaluate.published import MODELS, published_splits
from florence2.evaluate.report import Report
from florence2.evaluate.running import Running
from florence2.evaluate.tables.catalogue import TABLES, describe_files, find_split
from florence2.label.devices import label_on_devices
from florence2.label.options import add_work, check_work
from florence2.train.command import add_data_options
from florence2.train.evaluate_command import add_answering_options, measure_file

ALL = "all"
"""Stands for every split that has a published result, and those that can be scored in place of test splits."""
_OF_TABLES = (
    "data",
    "out",
    "protocol",
    "published",
    "shard",
    "score",
    "devices",
    "workers",
    "max_errors",
    "background",
)


def build_parser() -> argparse.ArgumentParser:
    """Return the grammar of the command."""
    parser = argparse.ArgumentParser(
        prog="florence2 evaluate",
        usage="florence2 evaluate [options] TABLE... --data DIR --out DIR\n       florence2 evaluate [options] DATA",
        description="Measure a checkpoint on tables of published benchmarks, next to the published results; or answer "
        "the questions of a data file and print the metrics of each task. "
        f"Tables: {', '.join(TABLES)}; {ALL} stands for every published split, TABLE:SPLIT for another one. "
        "The answers go to --out, one folder for each split; the same command resumes an unfinished run, and another "
        "--protocol asks only what it adds. "
        "Example: florence2 evaluate refcoco+:testA coco-caption --data data --out report",
    )
    parser.add_argument(
        "names",
        nargs="*",
        type=name_argument,
        metavar="TABLE|DATA",
        help="tables; or JSON Lines of image, prefix, suffix; or a COCO .json",
    )
    _add_tables(parser)
    add_data_options(parser)
    add_answering_options(parser)
    add_calibration(parser)
    parser.add_argument("--json", action="store_true", help="JSON instead of a table on stdout")
    return parser


def _add_tables(parser: argparse.ArgumentParser) -> None:
    """Add the options of tables."""
    parser.add_argument("--list", action="store_true", help="print the files of each table, their sizes and owners")
    parser.add_argument("--data", type=path_argument, metavar="DIR", help="the folder of the files that --list names")
    parser.add_argument("--out", type=path_argument, metavar="DIR", help="the folder for the answers and the report")
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="how to ask and count, such as ovd, grounding or detailed (default: the first one of each table)",
    )
    parser.add_argument(
        "--published", choices=MODELS, help="whose published results to show (default: those of --model, if any)"
    )
    parser.add_argument("--score", action="store_true", help="answer nothing; compute the results from --out")
    add_work(
        parser,
        shard="answer about the I-th of N parts of the images, 1/N to N/N, without results; then --score",
    )
    add_background(parser)


def main(arguments: Sequence[str]) -> int:
    """Measure a checkpoint; return the exit code.

    Raises:
        Florence2Error: A table, a data file, the model or an option cannot be used.
    """
    options = parse_words(build_parser(), arguments)
    if options.list:
        _print_files(options)
        return 0
    if not options.names:
        raise OptionError(f"Which table or data file? Tables: {', '.join((*TABLES, ALL))}; --list names their files.")
    if not any(map(names_table, options.names)):
        return _measure_file(options)
    return _measure_tables(options)


def names_table(word: str) -> bool:
    """Return whether a word names a table or its split; a file of that name has precedence."""
    return word.partition(":")[0] in (*TABLES, ALL) and not os.path.exists(word)  # noqa: PTH110  any word


def _measure_file(options: argparse.Namespace) -> int:
    """Measure the answers to the questions of a data file."""
    name, *others = options.names
    given = [setting for setting in _OF_TABLES if getattr(options, setting) not in (None, False)]
    if others or given:
        if not Path(name).exists():
            find_split(name)  # whose error names the tables
        wrong = f"{others[0]!r} is one file too many" if others else f"--{given[0].replace('_', '-')} goes with tables"
        raise OptionError(f"{wrong}: {name!r} is a data file, which is measured alone; leave it out.")
    options.data = Path(name)
    with require_extra("train", "`florence2 evaluate`"):
        return measure_file(options)


def _measure_tables(options: argparse.Namespace) -> int:
    """Answer the questions of tables, then print and write the report."""
    if options.images or options.task:
        raise OptionError(f"--{'images' if options.images else 'task'} goes with a data file; tables have their own.")
    if options.store is not None or options.store_limit is not None:
        raise OptionError("--store goes with a data file; the answers about tables are kept in --out.")
    for name in ("data", "out"):
        if getattr(options, name) is None:
            raise OptionError(f"Tables need --{name} DIR, {'their files' if name == 'data' else 'for the answers'}.")
    if options.score and options.shard:
        raise OptionError("--score computes the results of all shards; leave --shard out.")
    check_at_least(options, 1, "batch", "limit")
    check_work(options)
    generation_changes(options)
    options.min_confidence = options.confidence = None  # every box counts, and they are ranked
    running = Running(options, TORCH, _splits(options.names))
    code = 0 if options.score else _answer(options, running)
    if options.shard or code not in (0, EXIT_INCOMPLETE):
        return code
    report = running.score()
    report.write(options.out)
    _print_report(report, options.json)
    return EXIT_INCOMPLETE if any(result.unanswered for result in report.results) else code


def _answer(options: argparse.Namespace, running: Running) -> int:
    running.check_images()
    if not options.devices:
        return running.answer()
    TORCH.find(options)  # once, before the processes
    return label_on_devices(options, answer_tables)


def answer_tables(options: argparse.Namespace) -> int:
    """Answer the questions of a shard in a process of its own; return the exit code."""
    return Running(options, TORCH, _splits(options.names)).answer()


def _splits(names: Sequence[str]) -> list[str]:
    """Return the names of the splits as "TABLE:SPLIT", each once."""
    splits: list[str] = []
    for name in names:
        if name == ALL:
            splits += filter(_is_known, published_splits())
            splits += [f"{table}:{next(iter(TABLES[table].splits))}" for table in TABLES]
        else:
            table, split, *_ = find_split(name)
            splits.append(f"{table}:{split}")
    return list(dict.fromkeys(splits))


def _is_known(name: str) -> bool:
    table, _, split = name.partition(":")
    return split in TABLES[table].splits


def _print_files(options: argparse.Namespace) -> None:
    names = [name for name in options.names if name != ALL]
    tables = [find_split(name)[0] for name in names] or list(TABLES)
    for row in describe_files(tables):
        print("\t".join(row))
    say("florence2: Sizes are estimates for the unpacked files.")


def _print_report(report: Report, as_json: bool) -> None:
    print(json.dumps(report.to_dict()) if as_json else report.to_markdown(), end="\n" if as_json else "")
