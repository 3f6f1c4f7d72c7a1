"""The classes of input, and how many cases each gets: cheap ones more."""

from collections.abc import Sequence

CLASSES = {
    "parsing": 270,
    "prompts": 220,
    "images": 130,
    "checkpoints": 75,
    "tokenizers": 40,
    "adapters": 70,
    "training": 70,
    "pickles": 60,
    "commands": 40,
    "pages": 15,
    "sources": 100,
    "journals": 60,
    "shards": 60,
    "datasets": 60,
    "tables": 60,
    "runs": 5,
    "threads": 5,
}
"""By name, which is also the module's: weights, whose sum does not matter. A module has `draw(random)`, which makes a
case of plain values, and `check(case, place)`, which returns for a right result and raises Florence2Error for a
refusal, and Wrong where something broken was accepted."""


def share_out(cases: int, names: Sequence[str]) -> dict[str, int]:
    """Share out a number of cases by the weights of the classes; each gets at least one."""
    total = sum(CLASSES[name] for name in names)
    return {name: max(1, round(cases * CLASSES[name] / total)) for name in dict.fromkeys(names)}
