"""Draw mutants, run the tests against each, and name those that live. Exit code 1 when too many do."""

import argparse
import difflib
import hashlib
import sys
import time
from pathlib import Path

from tests.mutate.equivalent import is_equivalent
from tests.mutate.mutants import Mutant, find_mutants
from tests.mutate.running import run_all
from tests.mutate.selection import sources, tests_of

ROOT = Path(__file__).parents[2]
WANTED = 0.95
"""The share of mutants that the tests must kill."""


def draw(root: Path, only: list[str], seed: int, count: int) -> list[Mutant]:
    """Return a sample of all mutants that are not known to be equivalent.

    It depends on the seed and the text of the changed lines alone, so another line of code costs at most one of them.
    """
    every = [mutant for path in sources(root, only) for mutant in find_mutants(path, (root / path).read_text("utf-8"))]
    wanted = [mutant for mutant in every if not is_equivalent(mutant)]

    def lot(mutant: Mutant) -> bytes:
        text = f"{seed} {mutant.path} {mutant.within} {mutant.source} {mutant.old} {mutant.new}"
        return hashlib.sha256(text.encode()).digest()

    return sorted(wanted, key=lot)[:count]


def difference(root: Path, mutant: Mutant) -> str:
    """Return the mutant as a diff of the lines that it changes."""
    text = (root / mutant.path).read_text("utf-8")
    lines = difflib.unified_diff(text.splitlines(), mutant.apply(text).splitlines(), n=0, lineterm="")
    return "\n".join(list(lines)[3:])


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutate", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default 1)")
    parser.add_argument("--count", type=int, default=60, help="how many mutants are drawn (default 60)")
    parser.add_argument("--jobs", type=int, default=2, help="how many run at a time (default 2)")
    parser.add_argument(
        "--passed", action="store_true", help="pytest has just passed: do not run the tests on the unchanged code first"
    )
    parser.add_argument("--only", action="append", default=[], metavar="PATH", help="a file or folder of florence2/")
    parser.add_argument("--list", action="store_true", help="print the mutants and their tests; run nothing")
    options = parser.parse_args(arguments)
    mutants = draw(ROOT, options.only, options.seed, options.count)
    if options.list:
        for mutant in mutants:
            print(f"{mutant.path}:{mutant.line}  {' '.join(tests_of(ROOT, mutant.path))}\n{difference(ROOT, mutant)}")
        return 0
    started = time.monotonic()

    def report(mutant: Mutant, killed: bool) -> None:
        place = f"{mutant.path}:{mutant.line}"
        text = (
            f"killed  {place}"
            if killed
            else f"LIVES   {place} in {mutant.within or 'the module'}\n{difference(ROOT, mutant)}"
        )
        print(text, file=sys.stderr, flush=True)

    survivors = run_all(mutants, lambda mutant: tests_of(ROOT, mutant.path), ROOT, options.jobs, report, options.passed)
    killed = len(mutants) - len(survivors)
    print("".join(f"{mutant.path}:{mutant.line} lives\n" for mutant in survivors), end="")
    print(f"{killed} of {len(mutants)} mutants killed in {time.monotonic() - started:.0f} s (seed {options.seed})")
    return 0 if killed >= WANTED * len(mutants) else 1


if __name__ == "__main__":
    sys.exit(main())
