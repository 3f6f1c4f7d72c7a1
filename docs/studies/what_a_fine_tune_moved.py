"""How did fine-tuning change the model?

    python docs/studies/what_a_fine_tune_moved.py --model nano --out ball --steps 40

The model is taught one new word: in the answers to <OD> a circle is now called "ball". Then the two checkpoints are
compared layer by layer, and so are their answers on scenes that neither has seen, with and without a circle.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

from florence2 import Florence2, load
from florence2.checkpoints.checkpoint import checkpoint_folder, copy_companions, save_checkpoint
from florence2.checkpoints.hub import resolve
from florence2.errors import Florence2Error
from florence2.inspect.audit.difference import Difference, compare_checkpoints
from florence2.inspect.regions import mean_iou
from florence2.inspect.table import format_table
from florence2.train.samples import Sample
from florence2.train.settings import TrainSettings
from florence2.train.targets import boxes_target
from florence2.train.trainer import train
from recipes.nano.scenes import Scene, make_scene

OLD, NEW, TAUGHT, ASKED = "circle", "ball", 5, 6  # the words; the seeds of scenes


def scenes_with(seed: int, count: int, old: bool) -> list[Scene]:
    """Return the first scenes of a seed that have a circle, or that have none."""
    scenes = (make_scene(seed, index) for index in itertools.count())
    return list(itertools.islice((s for s in scenes if old == any(t.category == OLD for t in s.things)), count))


def fine_tune(folder: Path, out: Path, settings: TrainSettings) -> None:
    """Teach the checkpoint in `folder` the word, and write the new one to `out`."""
    f, lessons = load(folder), []
    for old in (True, False):
        for scene in scenes_with(TAUGHT, settings.steps * settings.batch // 2, old):
            rows = [(NEW if thing.category == OLD else thing.category, thing.box) for thing in scene.things]
            lessons.append(Sample(scene.image, (("<OD>", boxes_target(rows, scene.image.size)),)))
    train(f.model, f.processor, lessons, settings, out / "run")
    save_checkpoint(f.model, out, "microsoft", f.model.dtype)
    copy_companions(checkpoint_folder(folder), out)


def compare_answers(before: Florence2, after: Florence2, scenes: Sequence[Scene]) -> dict[str, float]:
    """Count the changed answers and labels and the uses of either word, and measure the overlap of the boxes."""
    requests = [("<OD>", scene.image) for scene in scenes]
    one, two = (f.run_batch(requests, options=f.options(max_new_tokens=100)) for f in (before, after))
    pairs = list(zip(one, two, strict=True))
    overlaps = [mean_iou([box.xyxy for box in a.boxes], b.boxes, a.image_size) for a, b in pairs if a.boxes]
    return {
        "scenes": len(pairs),
        "answer changed": sum(a.token_ids != b.token_ids for a, b in pairs),
        "labels changed": sum([box.label for box in a.boxes] != [box.label for box in b.boxes] for a, b in pairs),
        "IoU of boxes": round(sum(overlaps) / max(1, len(overlaps)), 3),
        f"{OLD} before": sum(OLD in a.text for a in one),
        f"{OLD} after": sum(OLD in b.text for b in two),
        f"{NEW} before": sum(NEW in a.text for a in one),
        f"{NEW} after": sum(NEW in b.text for b in two),
    }


def study(model: str, out: Path, settings: TrainSettings, scenes: int) -> tuple[Difference, list[dict[str, float]]]:
    """Fine-tune, then compare the checkpoints and their answers on `scenes` scenes with a circle and without."""
    folder = resolve(model)
    fine_tune(folder, out, settings)
    before, after = load(folder), load(out)
    answers = [compare_answers(before, after, scenes_with(ASKED, scenes, old)) for old in (True, False)]
    return compare_checkpoints(folder, out, spectra=False), answers


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the tables. Return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a name, Hub id or folder (nano)")
    parser.add_argument("--out", type=Path, required=True, help="the folder for the new checkpoint and its run")
    parser.add_argument("--steps", type=int, default=40, help="optimizer steps, of 8 scenes each (40)")
    parser.add_argument("--scenes", type=int, default=20, help="test scenes with and without a circle, each (20)")
    chosen = parser.parse_args(arguments)
    try:
        settings = TrainSettings(steps=chosen.steps, learning_rate=4e-4, warmup=5, workers=0)
        difference, (circles, rest) = study(chosen.model, chosen.out, settings, chosen.scenes)
    except Florence2Error as error:
        print(f"what_a_fine_tune_moved: {error}", file=sys.stderr)
        return 2
    layers = sorted(difference.layers, key=lambda layer: layer.change.relative or 0, reverse=True)
    rows = [[layer.name, f"{100 * (layer.change.relative or 0):.3f} %"] for layer in layers]
    print("\n".join(format_table([["layer", "moved by"], *rows])), end="\n\n")
    rows = [[row, str(circles[row]), str(rest[row])] for row in circles]
    print("\n".join(format_table([["answers to <OD>", f"with a {OLD}", "without"], *rows])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
