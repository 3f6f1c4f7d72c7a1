"""The learning rate schedule."""

import math

from florence2.train.settings import TrainSettings


def rate_at(step: int, settings: TrainSettings) -> float:
    """Return the learning rate of update `step`, counted from 0: a linear warm-up, then half a cosine down to 0."""
    if step < settings.warmup:
        return settings.learning_rate * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(settings.steps - settings.warmup, 1)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
