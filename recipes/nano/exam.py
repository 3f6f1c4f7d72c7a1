"""Measure how well a checkpoint answers every task on synthetic scenes that it was not trained on."""

import random
from collections.abc import Callable

from PIL import Image

from florence2.generation.options import GenerationOptions
from florence2.pipeline import Florence2
from florence2.train.evaluate import answer_samples
from florence2.train.metrics import Metrics, Pair, measure_by_task
from florence2.train.samples import Sample
from recipes.nano.scene_tasks import SCENE_TASKS, ask
from recipes.nano.scenes import Scene, make_scene
from recipes.nano.spoiling import spoil


class Exam:
    """Samples of the first `count` scenes of a seed, each with a question of every task that has an answer there.

    The share `spoilt` of the images, 0 to 1, is spoilt: see `recipes.nano.spoiling`.
    """

    def __init__(self, seed: int, count: int, spoilt: float = 0.0):
        self.seed, self.count, self.spoilt = seed, count, spoilt

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < self.count:
            raise IndexError(index)
        scene, rng = self.scene(index), random.Random(f"exam {self.seed}/{index}")
        questions = [question for task in SCENE_TASKS if (question := ask(task, scene, rng)) is not None]
        pairs = tuple((question.prefix, question.suffix) for question in questions)
        return Sample(self._image(scene, index), pairs, f"scene {self.seed}/{index}")

    def scene(self, index: int) -> Scene:
        """Return the scene of the sample with this index."""
        return make_scene(self.seed, index)

    def is_spoilt(self, index: int) -> bool:
        """Return whether the image of the sample with this index is spoilt."""
        return self._rng(index).random() < self.spoilt

    def _image(self, scene: Scene, index: int) -> Image.Image:
        rng = self._rng(index)
        return spoil(scene.image, rng) if rng.random() < self.spoilt else scene.image

    def _rng(self, index: int) -> random.Random:
        return random.Random(f"spoil {self.seed}/{index}")


def examine(
    f: Florence2,
    exam: Exam,
    options: GenerationOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Metrics]:
    """Measure the answers with `measure_by_task`; call `progress(done, of)` after each scene.

    `<CAPTION>` has one more metric, `named`: the share of captions that name every thing with its colour.
    """
    pairs: list[Pair] = []
    named: list[bool] = []
    for index, outcomes in enumerate(answer_samples(f, exam, batch_size=16, options=options)):
        for outcome in outcomes:
            assert outcome.pair is not None, outcome.error  # every question of the exam is valid
            pairs.append(outcome.pair)
            if outcome.prompt == "<CAPTION>":
                named.append(names_all(outcome.pair[1].text, exam.scene(index)))
        if progress is not None:
            progress(index + 1, len(exam))
    metrics = measure_by_task(pairs)
    metrics["<CAPTION>"]["named"] = sum(named) / len(named)
    return metrics


def names_all(caption: str, scene: Scene) -> bool:
    """Return whether the caption names every thing of the scene once, with its colour, and nothing else."""
    phrases = caption.replace(" and ", ", ").split(", ")
    return sorted(words.partition(" ")[2] for words in phrases) == sorted(thing.phrase for thing in scene.things)
