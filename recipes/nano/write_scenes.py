"""`python -m recipes.nano.write_scenes DIR`: made-up scenes as PNG files, with questions in `data.jsonl`.

Data to try training and measuring with, in the form that `florence2 train` and `florence2 evaluate` read.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from florence2.errors import Florence2Error, OptionError
from recipes.nano.scene_tasks import SCENE_TASKS, ask
from recipes.nano.scenes import Scene, make_scene

SIZES = "sizes"
SIZES_QUESTION = "Which things are large, and which are small?"
"""What no checkpoint was trained on, `nano` neither: to try fine-tuning with."""
_SIZES = ("large", "small")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the pictures and their questions; what is there already is written over."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.write_scenes", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="which series of scenes (0)")
    parser.add_argument("--count", type=int, default=100, help="how many (100)")
    parser.add_argument("--ask", nargs="+", default=["<OD>"], metavar="TASK", help="task tokens, and `sizes` (<OD>)")
    options = parser.parse_args(arguments)
    try:
        write_scenes(options.folder, options.seed, options.count, options.ask)
    except (Florence2Error, OSError) as error:
        print(f"write_scenes: {error}", file=sys.stderr)
        return 2
    print(options.folder / "data.jsonl")
    return 0


def write_scenes(folder: Path, seed: int, count: int, tasks: Sequence[str]) -> None:
    """Write scenes 0 to `count` of `seed` to `folder`, asked `tasks`. Raises OptionError for an unknown one."""
    unknown = [task for task in tasks if task != SIZES and task not in SCENE_TASKS]
    if unknown or count < 1:
        raise OptionError(
            f"Cannot write {count} scenes asked {', '.join(unknown or tasks)}: give a count of 1 or more, and of the "
            f"tasks {SIZES}, {', '.join(SCENE_TASKS)}."
        )
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for index in range(count):
            scene, name = make_scene(seed, index), f"{index:06}.png"
            scene.image.save(folder / name)
            for prefix, suffix in _questions(scene, tasks, random.Random(f"exam {seed}/{index}")):
                file.write(json.dumps({"image": name, "prefix": prefix, "suffix": suffix}) + "\n")


def sizes(scene: Scene) -> str:
    """The things sorted by their size: "large: red circle, blue word; small: none"."""
    named = {size: ", ".join(thing.phrase for thing in scene.things if thing.size == size) for size in _SIZES}
    return "; ".join(f"{size}: {phrases or 'none'}" for size, phrases in named.items())


def _questions(scene: Scene, tasks: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    for task in tasks:
        if task == SIZES:
            yield SIZES_QUESTION, sizes(scene)
        elif (found := ask(task, scene, rng)) is not None and found.suffix:
            yield found.prefix, found.suffix


if __name__ == "__main__":
    sys.exit(main())
