"""Freeze parts of the model."""

from collections.abc import Sequence

from torch import nn

from florence2.errors import ConfigError
from florence2.model.florence2 import Florence2Model

PARTS: dict[str, tuple[str, ...]] = {
    "vision": ("vision_tower",),
    "projection": ("multi_modal_projector",),
    "encoder": ("language_model.encoder",),
    "decoder": ("language_model.decoder",),
    "embeddings": ("language_model.shared", "lm_head"),
    "language": ("language_model", "lm_head"),
}
"""The names that `--freeze` accepts, and their modules; only an untied model has an `lm_head`."""


def freeze(model: Florence2Model, parts: Sequence[str]) -> None:
    """Turn off the gradients of the named parts, and with them their dropout and stochastic depth.

    `parts` are keys of PARTS or module paths. Raises ConfigError for an unknown name, or when nothing is left to train.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in parts if name not in PARTS and name not in modules]
    if unknown:
        raise ConfigError(
            f"Unknown part to freeze: {', '.join(map(repr, unknown))}. Known parts: {', '.join(PARTS)}, or a module "
            "path such as vision_tower.blocks.0."
        )
    for name in parts:
        for path in PARTS.get(name, (name,)):
            if path in modules:
                modules[path].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError(f"With {', '.join(parts)} frozen, nothing is left to train. Leave one out.")
    set_training(model)


def set_training(model: nn.Module) -> None:
    """Put modules that learn in training mode, and those whose parameters are all frozen in evaluation mode."""
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def count_trainable(model: Florence2Model) -> dict[str, tuple[int, int]]:
    """Count (trainable, all) parameters by part; the parts add up to the whole model."""
    counts, modules = {}, dict(model.named_modules())
    for name in ("vision", "projection", "encoder", "decoder", "embeddings"):
        parameters = [p for path in PARTS[name] if path in modules for p in modules[path].parameters()]
        counts[name] = (sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters))
    return counts
