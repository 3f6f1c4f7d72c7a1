"""How well a checkpoint answers every task on made-up scenes that it has not seen."""

import random
from collections.abc import Callable

from florence2.generation.options import GenerationOptions
from florence2.pipeline import Florence2
from florence2.train.data import Sample
from florence2.train.evaluate import answer_samples
from florence2.train.metrics import Metrics, Pair, measure_by_task
from recipes.nano.scene_tasks import SCENE_TASKS, ask
from recipes.nano.scenes import Scene, make_scene


class Exam:
    """Samples of the first `count` scenes of a seed, each asked every task that has an answer there."""

    def __init__(self, seed: int, count: int):
        self.seed, self.count = seed, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene, rng = self.scene(index), random.Random(f"exam {self.seed}/{index}")
        asked = [found for task in SCENE_TASKS if (found := ask(task, scene, rng)) is not None]
        pairs = tuple((question.prefix, question.suffix) for question in asked)
        return Sample(scene.image, pairs, f"scene {self.seed}/{index}")

    def scene(self, index: int) -> Scene:
        """The scene behind a sample."""
        return make_scene(self.seed, index)


def examine(
    f: Florence2,
    exam: Exam,
    options: GenerationOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Metrics]:
    """The metrics of `measure_by_task`, and for `<CAPTION>` `named`: the share of scenes of which the caption names
    every thing with its colour. `progress(done, of)` is called after each scene."""
    pairs: list[Pair] = []
    named: list[bool] = []
    for index, outcomes in enumerate(answer_samples(f, exam, batch_size=16, options=options)):
        for outcome in outcomes:
            assert outcome.pair is not None, outcome.error  # the exam asks nothing that cannot be asked
            pairs.append(outcome.pair)
            if outcome.prompt == "<CAPTION>":
                named.append(names_all(outcome.pair[1].text, exam.scene(index)))
        if progress is not None:
            progress(index + 1, len(exam))
    metrics = measure_by_task(pairs)
    metrics["<CAPTION>"]["named"] = sum(named) / len(named)
    return metrics


def names_all(caption: str, scene: Scene) -> bool:
    """Whether every thing of the scene is there, once, with its colour, and nothing else is."""
    said = caption.replace(" and ", ", ").split(", ")
    return sorted(words.partition(" ")[2] for words in said) == sorted(thing.phrase for thing in scene.things)
