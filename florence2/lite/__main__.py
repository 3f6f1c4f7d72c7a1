"""The program `python -m florence2.lite`, with signals and streams in order as those of `florence2`."""

import sys

from florence2.__main__ import launch


def main() -> int:
    """Run the command line of this process; return the exit code."""
    return launch("florence2.lite.command")


if __name__ == "__main__":
    sys.exit(main())
