"""`python -m recipes.nano.write_scenes DIR`: synthetic scenes as PNG files, with questions in `data.jsonl`.

The files are data to try `florence2 train` and `florence2 evaluate` with.
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
from recipes.nano.spoiling import spoil

SIZES = "sizes"
SIZES_QUESTION = "Which things are large, and which are small?"
"""A question that no checkpoint was trained on, not even `nano`: something new to fine-tune on."""
_SIZES = ("large", "small")


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the images and their questions, replacing existing files."""
    parser = argparse.ArgumentParser(prog="python -m recipes.nano.write_scenes", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, help="which series of scenes (0)")
    parser.add_argument("--count", type=int, default=100, help="how many (100)")
    parser.add_argument("--ask", nargs="+", default=["<OD>"], metavar="TASK", help="task tokens, or `sizes` (<OD>)")
    parser.add_argument("--spoil", type=float, default=0.0, help="the share of scenes to spoil, 0 to 1 (0)")
    options = parser.parse_args(arguments)
    try:
        write_scenes(options.folder, options.seed, options.count, options.ask, options.spoil)
    except (Florence2Error, OSError) as error:
        print(f"write_scenes: {error}", file=sys.stderr)
        return 2
    print(options.folder / "data.jsonl")
    return 0


def write_scenes(folder: Path, seed: int, count: int, tasks: Sequence[str], spoilt: float = 0.0) -> None:
    """Write the first `count` scenes of `seed` to `folder`, with questions of `tasks`; a share of them is `spoilt`.

    Raises OptionError for an unknown task, a count below 1, or a share outside of 0 to 1.
    """
    if not 0 <= spoilt <= 1:
        raise OptionError(f"--spoil is {spoilt}; it must be 0 to 1.")
    unknown = [task for task in tasks if task != SIZES and task not in SCENE_TASKS]
    if unknown:
        raise OptionError(f"Unknown task {', '.join(unknown)}. Known tasks: {SIZES}, {', '.join(SCENE_TASKS)}.")
    if count < 1:
        raise OptionError(f"--count is {count}; it must be at least 1.")
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "data.jsonl").open("w", encoding="utf-8") as file:
        for index in range(count):
            scene, name = make_scene(seed, index), f"{index:06}.png"
            rng = random.Random(f"spoil {seed}/{index}")
            image = spoil(scene.image, rng) if rng.random() < spoilt else scene.image
            image.save(folder / name)
            for prefix, suffix in _questions(scene, tasks, random.Random(f"exam {seed}/{index}")):
                file.write(json.dumps({"image": name, "prefix": prefix, "suffix": suffix}) + "\n")


def sizes(scene: Scene) -> str:
    """Sort the things by size: "large: red circle, blue word; small: none"."""
    named = {size: ", ".join(thing.phrase for thing in scene.things if thing.size == size) for size in _SIZES}
    return "; ".join(f"{size}: {phrases or 'none'}" for size, phrases in named.items())


def _questions(scene: Scene, tasks: Sequence[str], rng: random.Random) -> Iterator[tuple[str, str]]:
    for task in tasks:
        if task == SIZES:
            yield SIZES_QUESTION, sizes(scene)
        elif (question := ask(task, scene, rng)) is not None and question.suffix:
            yield question.prefix, question.suffix


if __name__ == "__main__":
    sys.exit(main())
