"""`python -m tests.fuzz [CLASS ...]`: spoilt input of every class; the table says what became of it."""

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.fuzz.classes import CLASSES, share_out
from tests.fuzz.engine import FAILURES, OUTCOMES, Key, Result, run_cases


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz",
        description="Feed spoilt input of every class to the package. Each case must be answered rightly or refused in "
        "a sentence, within 20 s of CPU time and 1 GiB of memory. Exit code 1 after any failure. "
        "Example, one case again: python -m tests.fuzz parsing --first 17 --cases 1",
    )
    parser.add_argument("classes", nargs="*", metavar="CLASS", help=f"any of {', '.join(CLASSES)} (default: all)")
    parser.add_argument("--cases", type=int, default=2000, help="cases of all classes together (default: 2000)")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other cases (default: 0)")
    parser.add_argument("--first", type=int, default=0, metavar="I", help="number of the first case (default: 0)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes (default: one a core)")
    parser.add_argument("--verbose", action="store_true", help="show every case")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = build_parser().parse_args(arguments)
    if unknown := [name for name in options.classes if name not in CLASSES]:
        print(f"Unknown class {unknown[0]!r}. Known classes: {', '.join(CLASSES)}.", file=sys.stderr)
        return 2
    counts = share_out(options.cases, options.classes or list(CLASSES))
    table: dict[str, Counter[str]] = {}
    failed = False
    with tempfile.TemporaryDirectory(prefix="fuzz-", ignore_cleanup_errors=True) as folder:
        for name, count in counts.items():
            results = Report(options.verbose)
            keys = (Key(name, options.seed, options.first + i) for i in range(count))
            table[name] = run_cases(keys, Path(folder), min(options.jobs, count), results)
            print(f"{name}: {count:,} cases, {results.seconds:.0f} s of work", file=sys.stderr, flush=True)
            failed |= any(table[name][outcome] for outcome in FAILURES)
    print("\n".join(lines(table)))
    return int(failed)


class Report:
    """Shows failures as they come: the input, the place, and the command that repeats the case."""

    def __init__(self, verbose: bool):
        self.verbose, self.seconds = verbose, 0.0

    def __call__(self, result: Result) -> None:
        self.seconds += result.seconds
        if result.failed or self.verbose:
            print(f"{result.outcome.upper()} {result.key}\n    {result.note}", flush=True)


def lines(table: dict[str, Counter[str]]) -> Iterator[str]:
    """The table in Markdown, with a last row for all classes."""
    rows = [*table.items(), *([("all", sum(table.values(), Counter()))] if len(table) > 1 else [])]
    yield f"| class | cases | {' | '.join(OUTCOMES)} |"
    yield f"| --- |{' --- |' * (1 + len(OUTCOMES))}"
    for name, counts in rows:
        numbers = [counts.total(), *(counts[outcome] for outcome in OUTCOMES)]
        yield f"| {name} | {' | '.join(f'{number:,}' for number in numbers)} |"


if __name__ == "__main__":
    sys.exit(main())
