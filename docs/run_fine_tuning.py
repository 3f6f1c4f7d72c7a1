"""Run the commands of fine-tuning.md, unchanged, in a folder: `python docs/run_fine_tuning.py FOLDER`."""

import re
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

PAGE = Path(__file__).with_name("fine-tuning.md")


def commands() -> list[list[str]]:
    """Return every command of the page except the installation, in order, as words."""
    blocks = re.findall(r"```sh\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line) for line in lines if not line.startswith("pip ")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the commands until one fails, and return its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if len(words) != 1:
        print("usage: python docs/run_fine_tuning.py FOLDER", file=sys.stderr)
        return 2
    folder = Path(words[0])
    folder.mkdir(parents=True, exist_ok=True)
    for command in commands():
        print(f"$ {shlex.join(command)}", flush=True)
        start = time.monotonic()
        done = subprocess.run(_with_this_python(command), cwd=folder, check=False)
        if done.returncode:
            return done.returncode
        print(f"({time.monotonic() - start:.0f} s)\n", flush=True)
    return 0


def _with_this_python(command: Sequence[str]) -> list[str]:
    """Run the command with this interpreter: the shell might find another."""
    rest = command[1:] if command[0] == "python" else ["-m", *command]
    return [sys.executable, *rest]


if __name__ == "__main__":
    sys.exit(main())
