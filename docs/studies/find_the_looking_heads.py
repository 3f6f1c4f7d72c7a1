"""Which attention heads find the object that a location token refers to?

    python docs/studies/find_the_looking_heads.py --model nano --scenes 20

The decoder is given each scene's true answer to <OD>. Where it is about to write one of the four locations of an
object's box, we measure the share of each cross-attention head's weight that lies in that box. Then we switch off one
head at a time: the heads that find the object are those without which the model no longer knows its locations.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import florence2
from florence2.errors import Florence2Error, OptionError
from florence2.inspect import Tracing, ablate_heads, teacher_force
from florence2.inspect.regions import coverage, image_cells
from florence2.inspect.table import format_table
from recipes.nano.scene_tasks import ask
from recipes.nano.scenes import Scene, make_scene


@dataclass(frozen=True)
class Head:
    """One head: its share of attention in the box at left, top, right, bottom, and their mean; `chance`, the share of
    uniform attention; the fall of the locations' log-probability without it, and their shift in bins."""

    layer: int
    head: int
    shares: tuple[float, ...]
    share: float
    chance: float
    drop: float
    shift: float


def look(f: florence2.Florence2, scene: Scene) -> tuple[Tensor, Tensor]:
    """Return each head's share of attention in each object's box, (layers, heads, objects, 4), and uniform shares."""
    asked = ask("<OD>", scene, random.Random(0))
    assert asked is not None
    case = teacher_force(f, ("<OD>", scene.image), asked.suffix)
    names = [f"decoder.layers.{i}.cross_attention.weights" for i in range(f.model.config.text.decoder_layers)]
    recording = Tracing(f.model.config, names).start()
    with torch.no_grad():
        f.model.decode(case.inputs, case.memory, trace=recording)
    weights = torch.stack([recording.values[name][0][0] for name in names])  # (layers, heads, T, S)
    grid, cells = image_cells(f)
    inside = torch.zeros(len(asked.things), case.memory.shape[1])  # the share of each position in a box
    for row, thing in enumerate(asked.things):
        inside[row, cells] = coverage(thing.box, scene.image.size, grid).flatten().float()
    places = torch.tensor(case.positions("location")).view(-1, 4)  # one row for each object
    return torch.einsum("lhofs,os->lhof", weights[:, :, places], inside), inside.mean(dim=1)


def study(f: florence2.Florence2, scenes: Sequence[Scene]) -> list[Head]:
    """Measure every cross-attention head; those with the largest share in the box come first."""
    looked, chances = zip(*(look(f, scene) for scene in scenes), strict=True)
    shares, chance = torch.cat(looked, dim=2).mean(dim=2), float(torch.cat(chances).mean())  # (layers, heads, 4)
    found = []
    for row in ablate_heads(f, [("<OD>", scene.image) for scene in scenes]).rows:
        if row.head is None or row.locations is None or row.shift is None:
            raise OptionError("The model writes no locations on these scenes, so no head can be needed for them.")
        layer = int(row.name.split(".")[2])
        own = tuple(shares[layer, row.head].tolist())
        found.append(Head(layer, row.head, own, sum(own) / 4, chance, row.locations, row.shift))
    return sorted(found, key=lambda head: head.share, reverse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table. Return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="nano", help="a name, Hub id or folder (nano)")
    parser.add_argument("--scenes", type=int, default=20, help="how many synthetic scenes to use (20)")
    parser.add_argument("--seed", type=int, default=4, help="seed of the scenes (4)")
    options = parser.parse_args(arguments)
    try:
        heads = study(
            florence2.load(options.model), [make_scene(options.seed, i) for i in range(max(1, options.scenes))]
        )
    except Florence2Error as error:
        print(f"find_the_looking_heads: {error}", file=sys.stderr)
        return 2
    table = [["layer.head", "in the box", "x chance", "left", "top", "right", "bottom", "drop", "shift"]]
    for head in heads:
        numbers = [*(f"{share:.3f}" for share in head.shares), f"{head.drop:.3f}", f"{head.shift:.1f}"]
        table.append([f"{head.layer}.{head.head}", f"{head.share:.3f}", f"{head.share / head.chance:.1f}", *numbers])
    print("\n".join(format_table(table)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
