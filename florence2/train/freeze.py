"""Parts of the model that training leaves as they are."""

from collections.abc import Sequence

from torch import nn

from florence2.errors import ConfigError
from florence2.model.florence2 import Florence2Model

PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("vision_tower",),
    "projection": ("multi_modal_projector",),
    "encoder": ("language_model.encoder",),
    "decoder": ("language_model.decoder",),
    "embeddings": ("language_model.shared",),
    "language": ("language_model",),
}
"""What `--freeze` can name, and the modules meant."""


def freeze(model: Florence2Model, parts: Sequence[str]) -> None:
    """Stop the gradients of the named parts, and their dropout and stochastic depth with them.

    `parts` are keys of PARTS or module paths. Raises ConfigError for a name that is neither, or when nothing is left
    to train.
    """
    known = dict(model.named_modules())
    unknown = [name for name in parts if name not in PARTS and name not in known]
    if unknown:
        raise ConfigError(
            f"There is no part {', '.join(map(repr, unknown))} to freeze; choose {', '.join(PARTS)}, or a module path "
            "such as vision_tower.blocks.0."
        )
    for name in parts:
        for path in PARTS.get(name, (name,)):
            known[path].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"With {', '.join(parts)} frozen nothing is left to train; leave one out.")
    set_training(model)


def set_training(model: nn.Module) -> None:
    """Training mode for modules that learn, evaluation mode for those whose parameters are all frozen."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def count_trainable(model: Florence2Model) -> dict[str, tuple[int, int]]:
    """(trainable, all) parameters by part; they add up to the whole model."""
    counts = {}
    for name in ("vision", "projection", "encoder", "decoder", "embeddings"):
        parameters = [p for path in PARTS[name] for p in model.get_submodule(path).parameters()]
        counts[name] = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    return counts
