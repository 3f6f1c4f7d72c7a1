"""Everything a training run depends on except its data and the checkpoint that it starts from."""

import math
from dataclasses import dataclass
from typing import Literal

from florence2.errors import ConfigError

LEAST_SIZE = 0.1
"""The smallest share of its side to which an image can be shrunk."""


@dataclass(frozen=True)
class TrainSettings:
    """The settings of a run, checked when made. A run's folder keeps them in `settings.json`.

    Args:
        steps: Updates of the weights.
        batch: Images per update, over all processes together.
        micro_batch: Images computed at once; their gradients add up. None computes all of a process's share at once.
        learning_rate: The peak of the rate, which rises linearly over `warmup` steps and then falls as half a cosine
            to 0.
        warmup: Steps until the peak.
        weight_decay: For matrices and kernels; biases, norms and embeddings do not decay.
        betas: AdamW's betas.
        clip: Upper bound of the gradient's norm.
        seed: Fixes dropout and the order of the samples.
        freeze: Parts that do not train, see `freeze.PARTS`.
        precision: "bfloat16" is autocast; the weights stay float32.
        gradient_checkpointing: Save memory for up to a third more time.
        compile: Compile the layers of the language model with `torch.compile`, see `compiling`.
        flip: The share of samples that are mirrored, where their answers allow it; see `augmentation.can_flip`.
        shrink: The least size of an image within its frame, at a random place, as a share; 1 leaves images alone.
        colour: How far brightness, contrast and saturation vary: factors from 1 - `colour` to 1 + `colour`.
        shuffle: Shuffle every epoch differently; otherwise each goes through the samples in order.
        save_every: Steps between saved states.
        log_every: Steps between rows of the log.
        workers: Processes that prepare batches; 0 prepares them in the main process.

    Raises:
        ConfigError: One sentence with all values that are out of range.
    """

    steps: int = 1000
    batch: int = 8
    micro_batch: int | None = None
    learning_rate: float = 1e-5
    warmup: int = 100
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    seed: int = 0
    freeze: tuple[str, ...] = ()
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    compile: bool = False
    flip: float = 0.0
    shrink: float = 1.0
    colour: float = 0.0
    shuffle: bool = True
    save_every: int = 500
    log_every: int = 10
    workers: int = 1

    @property
    def varies_images(self) -> bool:
        """Return whether an image can differ from one epoch to the next."""
        return self.flip > 0 or self.shrink < 1 or self.colour > 0

    def __post_init__(self) -> None:
        """Raise ConfigError with all values that are out of range."""
        problems = [
            f"{name} is {getattr(self, name)}; it must be at least {least}"
            for name, least in (("steps", 1), ("batch", 1), ("warmup", 0), ("save_every", 1), ("log_every", 1))
            if getattr(self, name) < least
        ]
        problems += [
            f"{name} is {getattr(self, name)}; it must be above 0{end}"
            for name, most, end in (("learning_rate", 1e6, " and at most 1e6"), ("clip", math.inf, ""))
            if not 0 < getattr(self, name) <= most
        ]
        if self.micro_batch is not None and self.micro_batch < 1:
            problems.append(f"micro_batch is {self.micro_batch}; it must be at least 1")
        if self.workers < 0 or not 0 <= self.weight_decay < math.inf:
            problems.append("workers and weight_decay must be finite and not negative")
        if not 0 <= self.seed < 1 << 32:
            problems.append(f"seed is {self.seed}; it must be at least 0 and below 2**32")
        problems += [
            f"{name} is {getattr(self, name)}; it must be from {least} to 1"
            for name, least in (("flip", 0), ("shrink", LEAST_SIZE), ("colour", 0))
            if not least <= getattr(self, name) <= 1
        ]
        if self.precision not in ("float32", "bfloat16"):
            problems.append(f"precision is {self.precision!r}; it must be 'float32' or 'bfloat16'")
        if problems:
            raise ConfigError("Training settings: " + "; ".join(problems) + ".")
