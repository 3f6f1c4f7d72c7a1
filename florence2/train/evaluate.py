"""Compare a model's answers with the answers that samples want."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from torch import nn

from florence2.answers.answer import Answer
from florence2.errors import Florence2Error
from florence2.generation.options import GenerationOptions
from florence2.pipeline import EncodedImage, Florence2, Request
from florence2.stream import encode_ahead
from florence2.train.metrics import Metrics, Pair, measure_by_task
from florence2.train.samples import Sample, Samples
from florence2.train.store.images import StoredImages


@dataclass(frozen=True)
class Outcome:
    """One question of the sample `name`: the answer wanted and the answer given, or the error instead of both."""

    name: str
    prompt: str
    pair: Pair | None = None
    error: Florence2Error | None = None


def evaluate(
    f: Florence2,
    samples: Samples,
    batch_size: int | None = None,
    options: GenerationOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    stored: StoredImages | None = None,
) -> dict[str, Metrics]:
    """Answer every question of `samples` and measure the answers.

    Args:
        f: The model.
        samples: Questions with the answers wanted.
        batch_size: How many questions are answered at once; None is as many as a quarter of the free memory holds, at
            most 64.
        options: Generation settings; the checkpoint's own by default.
        progress: Called as `progress(done, total)` after each sample.
        stored: Encodes the images through a store; None encodes them here.

    Returns:
        The metrics of each task by its token, see `measure_by_task`.

    Raises:
        Florence2Error: The first image or prompt that cannot be used, with the sample's name.
    """
    pairs: list[Pair] = []
    for done, outcomes in enumerate(answer_samples(f, samples, batch_size, options, stored), 1):
        for outcome in outcomes:
            if outcome.error is not None:
                raise type(outcome.error)(f"{outcome.name or 'a sample'}: {outcome.error}")
        pairs += [outcome.pair for outcome in outcomes if outcome.pair is not None]
        if progress is not None:
            progress(done, len(samples))
    return measure_by_task(pairs, f.processor.tasks)


def answer_samples(
    f: Florence2,
    samples: Samples,
    batch_size: int | None = None,
    options: GenerationOptions | None = None,
    stored: StoredImages | None = None,
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of each sample, in order. An image is encoded once for all its questions, or read by `stored`.

    A bad image or prompt fails only its own questions. The model answers in evaluation mode and then returns to its
    earlier mode. Raises OptionError as `Florence2.stream`.
    """
    asked: deque[_Asked] = deque()  # a little ahead of the answers

    def requests() -> "Iterator[Request | Florence2Error]":
        for sample, image in stored.encode_all(samples) if stored is not None else _encode(f, samples, batch_size):
            asked.append(_Asked(sample, None if isinstance(image, Florence2Error) else image.size))
            yield from (image if isinstance(image, Florence2Error) else (prefix, image) for prefix, _ in sample.pairs)

    answers = f.stream(requests(), options=options, batch_size=batch_size)
    while True:
        with _evaluation_mode(f.model):  # for this answer alone: between two, the model is the caller's
            answer = next(answers, None)
        if answer is None:
            break
        while not asked[0].sample.pairs:
            yield asked.popleft().outcomes
        if asked[0].add(f, answer):
            yield asked.popleft().outcomes
    yield from (left.outcomes for left in asked)


def _encode(
    f: Florence2, samples: Samples, batch_size: int | None
) -> Iterator[tuple[Sample, EncodedImage | Florence2Error]]:
    """Yield each sample with its encoded image, or why it has none."""
    items = (samples[i] for i in range(len(samples)))
    yield from encode_ahead(f, items, lambda sample: f.prepare_image(sample.image), batch_size)


@dataclass
class _Asked:
    """A sample whose questions are asked, the size of its image if that could be read, and what came back."""

    sample: Sample
    image_size: tuple[int, int] | None
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, f: Florence2, answer: Answer | Florence2Error) -> bool:
        """Pair the next question with its answer; return whether it was the last one."""
        prompt, wanted = self.sample.pairs[len(self.outcomes)]
        if isinstance(answer, Florence2Error):
            self.outcomes.append(Outcome(self.sample.name, prompt, error=answer))
        else:
            assert self.image_size is not None
            # written like a model's answer: the parser takes "</s>" as the label of a quad that has none
            truth = f.processor.answer(prompt, f"</s><s>{wanted}</s>", image_size=self.image_size)
            self.outcomes.append(Outcome(self.sample.name, prompt, (truth, answer)))
        return len(self.outcomes) == len(self.sample.pairs)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Turn off dropout and stochastic depth within the block; then restore each module's own mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
