"""What happens to a box when its region of image tokens is patched from another picture?

    python docs/studies/patch_a_region.py --model nano --scenes 20

Each object of a made-up scene is asked for by its words, "a red circle". Then some of the image tokens that the
encoder is given are taken from another scene: those in the object's box, as many far away from it, or all others. How
probable are the four true locations still, and where is the most probable box?
"""

import argparse
import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import florence2
from florence2.errors import Florence2Error, OptionError
from florence2.inputs.coordinates import bins_to_pixels
from florence2.inspect import answer_scores, at, box_iou, cells_in, force, image_cells, likeliest_bins, replace
from florence2.inspect.table import format_table
from florence2.train.targets import boxes_target
from recipes.nano.scene_tasks import caption
from recipes.nano.scenes import Scene, Thing, make_scene

GROUNDING = "<CAPTION_TO_PHRASE_GROUNDING>"


@dataclass(frozen=True)
class Outcome:
    """One object under one condition: the mean log-probability of its true locations, and the overlap (IoU) of the
    most probable box with its own, and with what is nearest in the other picture."""

    condition: str
    logprob: float
    own: float
    others: float


def cells_by_condition(f: florence2.Florence2, thing: Thing, scene: Scene) -> dict[str, list[int]]:
    """Which cells of the grid, counted row by row, come from the other picture."""
    (rows, columns), _ = image_cells(f)
    inside = cells_in(thing.box, scene.image.size, (rows, columns), least=0.25)
    y, x = (sum(part) / len(inside) for part in zip(*(divmod(cell, columns) for cell in inside), strict=True))
    rest = set(range(rows * columns)) - set(inside)
    outside = sorted(rest, key=lambda cell: (cell % columns - x) ** 2 + (cell // columns - y) ** 2)
    far = outside[-len(inside) :]
    return {"nothing": [], "its own region": inside, "as much elsewhere": far, "all but its region": outside}


def outcomes(f: florence2.Florence2, scene: Scene, other: Scene) -> Iterator[Outcome]:
    """Every object of `scene` that `other` has not, under every condition."""
    tokens, size = f.encode_image(other.image).features[0], scene.image.size
    encoded, start = f.encode_image(scene.image), image_cells(f)[1].start
    stretch = [size[axis] / other.image.size[axis] for axis in (0, 1)] * 2
    there = [[value * by for value, by in zip(thing.box, stretch, strict=True)] for thing in other.things]
    for thing in (thing for thing in scene.things if thing.phrase not in {one.phrase for one in other.things}):
        words = caption([thing])
        case = force(f, (GROUNDING, encoded, words), boxes_target([(words, thing.box)], size))
        places = case.positions("location")
        for condition, cells in cells_by_condition(f, thing, scene).items():
            with f.patched({"image_tokens": at(replace(tokens), positions=[start + cell for cell in cells])}):
                scores = answer_scores(f, case, "prompt")
            logprobs = scores[places, [case.answer.token_ids[1:][place] for place in places]]
            box = bins_to_pixels(likeliest_bins(f, scores)[places].tolist(), size)
            nearest = max(box_iou(box, one, size) for one in there)
            yield Outcome(condition, float(logprobs.mean()), box_iou(box, thing.box, size), nearest)


def study(f: florence2.Florence2, scenes: Sequence[Scene]) -> list[Outcome]:
    """The mean of every condition, each scene being patched from the next."""
    found = [one for scene, other in itertools.pairwise(scenes) for one in outcomes(f, scene, other)]
    if not found:
        raise OptionError(f"{len(scenes)} scenes leave nothing to patch; give at least 2.")
    means = []
    for condition in dict.fromkeys(one.condition for one in found):
        rows = [(one.logprob, one.own, one.others) for one in found if one.condition == condition]
        means.append(Outcome(condition, *(sum(column) / len(rows) for column in zip(*rows, strict=True))))
    return means


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a name, Hub id or folder (nano)")
    parser.add_argument("--scenes", type=int, default=20, help="how many made-up scenes, of which each is patched (20)")
    parser.add_argument("--seed", type=int, default=4, help="which series of scenes (4)")
    options = parser.parse_args(arguments)
    try:
        means = study(florence2.load(options.model), [make_scene(options.seed, i) for i in range(options.scenes)])
    except Florence2Error as error:
        print(f"patch_a_region: {error}", file=sys.stderr)
        return 2
    rows = [[one.condition, f"{one.logprob:.3f}", f"{one.own:.3f}", f"{one.others:.3f}"] for one in means]
    print("\n".join(format_table([["from the other picture", "log-prob", "IoU own", "IoU others"], *rows])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
