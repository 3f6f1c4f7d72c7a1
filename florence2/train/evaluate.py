"""Compare a model's answers with the answers that samples want."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from florence2.answers.answer import Answer
from florence2.errors import Florence2Error, OptionError
from florence2.generation.options import GenerationOptions
from florence2.pipeline import EncodedImage, Florence2, PreparedImage, Request
from florence2.train.data import Sample, Samples
from florence2.train.metrics import Metrics, Pair, measure_by_task


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
    batch_size: int = 8,
    options: GenerationOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Metrics]:
    """Answer every question of `samples` and measure the answers.

    Args:
        f: The model.
        samples: Questions with the answers wanted.
        batch_size: Questions to compute at once.
        options: Generation settings; the checkpoint's own by default.
        progress: Called as `progress(done, total)` after each sample.

    Returns:
        The metrics of each task by its token, see `measure_by_task`.

    Raises:
        Florence2Error: The first image or prompt that cannot be used, with the sample's name.
    """
    pairs: list[Pair] = []
    for done, outcomes in enumerate(answer_samples(f, samples, batch_size, options), 1):
        for outcome in outcomes:
            if outcome.error is not None:
                raise type(outcome.error)(f"{outcome.name or 'a sample'}: {outcome.error}")
        pairs += [outcome.pair for outcome in outcomes if outcome.pair is not None]
        if progress is not None:
            progress(done, len(samples))
    return measure_by_task(pairs, f.processor.tasks)


def answer_samples(
    f: Florence2, samples: Samples, batch_size: int = 8, options: GenerationOptions | None = None
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of each sample, in order. An image is encoded once for all its questions.

    A bad image or prompt fails only its own questions. The model answers in evaluation mode and then returns to its
    earlier mode. Raises OptionError for a `batch_size` below 1.
    """
    if batch_size < 1:
        raise OptionError(f"batch_size is {batch_size}; it must be at least 1.")
    for start in range(0, len(samples), batch_size):
        chunk = [samples[i] for i in range(start, min(start + batch_size, len(samples)))]
        with _evaluation_mode(f.model):
            outcomes = _answer_together(f, chunk, batch_size, options)
        yield from outcomes


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


def _answer_together(
    f: Florence2, samples: Sequence[Sample], batch_size: int, options: GenerationOptions | None
) -> list[list[Outcome]]:
    images = _encode(f, samples)
    requests: list[Request] = [
        (prefix, image)
        for sample, image in zip(samples, images, strict=True)
        if isinstance(image, EncodedImage)
        for prefix, _ in sample.pairs
    ]
    answers = iter(_run(f, requests, batch_size, options))
    return [
        [_outcome(f, sample.name, prefix, suffix, image, answers) for prefix, suffix in sample.pairs]
        for sample, image in zip(samples, images, strict=True)
    ]


def _encode(f: Florence2, samples: Sequence[Sample]) -> list[EncodedImage | Florence2Error]:
    """Encode every sample's image; return the error in place of one that cannot be read."""
    prepared = [_prepare(f, sample) for sample in samples]
    encoded = iter(f.encode_images([image for image in prepared if isinstance(image, PreparedImage)]))
    return [next(encoded) if isinstance(image, PreparedImage) else image for image in prepared]


def _prepare(f: Florence2, sample: Sample) -> PreparedImage | Florence2Error:
    try:
        return f.prepare_image(sample.image)
    except Florence2Error as error:
        return error


def _run(
    f: Florence2, requests: Sequence[Request], batch_size: int, options: GenerationOptions | None
) -> list[Answer | Florence2Error]:
    """Answer every request. When the batch is refused, answer them one by one, so that only the bad ones fail."""
    try:
        return list(f.run_batch(requests, options=options, batch_size=batch_size))
    except Florence2Error as error:
        if len(requests) == 1:
            return [error]
    return [answer for request in requests for answer in _run(f, [request], 1, options)]


def _outcome(
    f: Florence2,
    name: str,
    prompt: str,
    wanted: str,
    image: EncodedImage | Florence2Error,
    answers: Iterator[Answer | Florence2Error],
) -> Outcome:
    """Pair a question with its answer, the next of `answers` if its image could be read."""
    if isinstance(image, Florence2Error):
        return Outcome(name, prompt, error=image)
    answer = next(answers)
    if isinstance(answer, Florence2Error):
        return Outcome(name, prompt, error=answer)
    # written like a model's answer: the parser takes "</s>" as the label of a quad that has none
    truth = f.processor.answer(prompt, f"</s><s>{wanted}</s>", image_size=image.size)
    return Outcome(name, prompt, (truth, answer))
