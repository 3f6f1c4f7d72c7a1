"""What happens to a box when the image tokens of its region come from another image?

    python docs/studies/patch_a_region.py --model nano --scenes 20

An object of a synthetic scene is requested by a phrase; then the image tokens in its box, as many far from it, or all
outside of it come from another scene. How probable are its true locations then, and where is the most probable box?
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import florence2
from florence2.errors import Florence2Error, OptionError
from florence2.inputs.coordinates import bins_to_pixels
from florence2.inspect import answer_scores, patches, teacher_force
from florence2.inspect.regions import box_iou, cells_in, image_cells
from florence2.inspect.table import format_table
from florence2.inspect.teacher_forcing import likeliest_bins
from florence2.train.targets import boxes_target
from recipes.nano.scene_tasks import caption
from recipes.nano.scenes import Scene, Thing, make_scene

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"


@dataclass(frozen=True)
class Outcome:
    """One object under one condition: the mean log-probability of its true locations, and the overlap (IoU) of the
    most probable box with the object's own box and with the nearest box of the other image."""

    condition: str
    logprob: float
    own: float
    others: float


def cells_by_condition(f: florence2.Florence2, thing: Thing, scene: Scene) -> dict[str, list[int]]:
    """Return the cells of the grid, counted row by row, that come from the other image."""
    (rows, columns), _ = image_cells(f)
    inside = cells_in(thing.box, scene.image.size, (rows, columns), least=0.25)
    y, x = (sum(part) / len(inside) for part in zip(*(divmod(cell, columns) for cell in inside), strict=True))
    by_distance = sorted(range(rows * columns), key=lambda cell: (cell % columns - x) ** 2 + (cell // columns - y) ** 2)
    outside = [cell for cell in by_distance if cell not in inside]
    far = outside[-len(inside) :]
    return {"nothing": [], "its own region": inside, "as much elsewhere": far, "all but its region": outside}


def outcomes(f: florence2.Florence2, scene: Scene, other: Scene) -> Iterator[Outcome]:
    """Yield every object of `scene` that `other` does not contain, under every condition."""
    swap, size = patches.replace(f.encode_image(other.image).features[0]), scene.image.size
    encoded, start = f.encode_image(scene.image), image_cells(f)[1].start
    there = [[v * size[i % 2] / other.image.size[i % 2] for i, v in enumerate(thing.box)] for thing in other.things]
    for thing in (thing for thing in scene.things if thing.phrase not in {one.phrase for one in other.things}):
        words = caption([thing])
        case = teacher_force(f, (GROUNDING, encoded, words), boxes_target([(words, thing.box)], size))
        places = case.positions("location")
        for condition, cells in cells_by_condition(f, thing, scene).items():
            with f.patched({"image_tokens": patches.at(swap, positions=[start + cell for cell in cells])}):
                scores = answer_scores(f, case, "prompt")
            logprobs = scores[places, [case.answer.token_ids[1:][place] for place in places]]
            box = bins_to_pixels(likeliest_bins(f, scores)[places].tolist(), size)
            nearest = max(box_iou(box, one, size) for one in there)
            yield Outcome(condition, float(logprobs.mean()), box_iou(box, thing.box, size), nearest)


def study(f: florence2.Florence2, scenes: Sequence[Scene]) -> list[Outcome]:
    """Return the mean of every condition; each scene is patched from the next."""
    found = [one for scene, other in itertools.pairwise(scenes) for one in outcomes(f, scene, other)]
    if not found:
        raise OptionError(f"{len(scenes)} scenes leave nothing to patch; give at least 2.")
    means = []
    for condition in dict.fromkeys(one.condition for one in found):
        rows = [(one.logprob, one.own, one.others) for one in found if one.condition == condition]
        means.append(Outcome(condition, *(sum(column) / len(rows) for column in zip(*rows, strict=True))))
    return means


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. Return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a name, Hub id or folder (nano)")
    parser.add_argument("--scenes", type=int, default=20, help="how many synthetic scenes to use (20)")
    parser.add_argument("--seed", type=int, default=4, help="seed of the scenes (4)")
    options = parser.parse_args(arguments)
    try:
        means = study(florence2.load(options.model), [make_scene(options.seed, i) for i in range(options.scenes)])
    except Florence2Error as error:
        print(f"patch_a_region: {error}", file=sys.stderr)
        return 2
    rows = [[one.condition, f"{one.logprob:.3f}", f"{one.own:.3f}", f"{one.others:.3f}"] for one in means]
    print("\n".join(format_table([["from the other image", "log-prob", "IoU own", "IoU others"], *rows])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
