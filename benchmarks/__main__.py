"""`python -m benchmarks COMMAND`: measure speed and memory."""

import sys

from benchmarks import compare, frozen, gpu, label, lite, scaling, serve, speed, traces, train
from florence2.errors import Florence2Error

COMMANDS = {
    "speed": (speed.main, "this project and the reference implementations on one checkpoint"),
    "scaling": (scaling.main, "how costs grow with images, beams, tokens, image size and threads"),
    "traces": (traces.main, "what a trace costs, and what model code costs that could be traced"),
    "gpu": (gpu.main, "everything to see on a GPU: first that it is right, then how fast"),
    "lite": (lite.main, "a checkpoint in torch, and the same without torch, from exported graphs"),
    "label": (label.main, "whether bulk labelling loses nothing, holds little and keeps the model busy"),
    "serve": (serve.main, "a server under load, against one without batching and cache"),
    "train": (train.main, "the trainer and transformers' native model, the same updates in turns"),
    "frozen": (frozen.main, "epochs with a frozen vision tower, with and without the store of its outputs"),
    "compare": (compare.main, "two checkouts of this project, in turns"),
}


def main(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_usage())
        return 0
    if name not in COMMANDS:
        print(f"benchmarks: Unknown command {name!r}. Known commands: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    try:
        return COMMANDS[name][0](arguments[1:])
    except Florence2Error as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _usage() -> str:
    lines = [f"  {name:8} {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(["usage: python -m benchmarks COMMAND [-h] ...", "", *lines])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
