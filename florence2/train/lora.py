"""LoRA through peft: train a few low-rank matrices instead of the model's weights."""

import copy
import difflib
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from florence2.checkpoints.adapters import ADAPTER_WEIGHTS, name_module
from florence2.checkpoints.tensors import write_safetensors
from florence2.errors import ConfigError
from florence2.fast.install import plain_class
from florence2.model.config import Layout
from florence2.model.florence2 import Florence2Model
from florence2.train.freeze import PARTS

_ADAPTER = "default"  # peft's name for the only adapter of a model
_PREFIX = "base_model.model."  # peft expects it before the names in a file


@dataclass(frozen=True)
class LoraSettings:
    """The size and place of the LoRA matrices, checked when made.

    Args:
        rank: The rank of the matrices.
        alpha: The learnt change is scaled by alpha / rank, with `rslora` by alpha / sqrt(rank).
        dropout: Dropout on the input of the matrices, 0 to below 1.
        parts: Keys of `freeze.PARTS`; by default the language model alone.
        targets: Names of modules in these parts, the last word of their paths: "q_proj", "k_proj", "v_proj",
            "out_proj", "fc1", "fc2" in the language model, "qkv", "proj", "fc1", "fc2" in the vision tower. Empty for
            every linear map.
        rslora: See `alpha`.

    Raises:
        ConfigError: One sentence with all values that are out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    parts: tuple[str, ...] = ("language",)
    targets: tuple[str, ...] = ()
    rslora: bool = False

    def __post_init__(self) -> None:
        """Raise ConfigError with all values that are out of range."""
        problems = []
        if self.rank < 1:
            problems.append(f"rank is {self.rank}; it must be at least 1")
        if not self.alpha > 0:
            problems.append(f"alpha is {self.alpha}; it must be above 0")
        if not 0 <= self.dropout < 1:
            problems.append(f"dropout is {self.dropout}; it must be at least 0 and below 1")
        unknown = [part for part in self.parts if part not in PARTS]
        if unknown or not self.parts:
            problems.append(f"parts are {', '.join(self.parts) or 'empty'}; choose from {', '.join(PARTS)}")
        if problems:
            raise ConfigError("LoRA settings: " + "; ".join(problems) + ".")


def add_lora(model: Florence2Model, settings: LoraSettings, seed: int = 0) -> None:
    """Put LoRA matrices into `model`, in place; afterwards only they have gradients.

    Until they are trained the model answers as before: B starts with zeros, and A is drawn from `seed`. Raises
    ConfigError when peft is not installed, when the model has matrices already, or for an unknown target, with similar
    names.
    """
    peft = _import_peft()
    if hasattr(model, "peft_config"):
        raise ConfigError("The model has LoRA matrices already. Load it again to add others.")
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=find_targets(model, settings),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, _ADAPTER)


def find_targets(model: Florence2Model, settings: LoraSettings) -> list[str]:
    """Return the paths of the modules that `settings` select, in order. Raise ConfigError like `add_lora`."""
    inside = tuple(f"{path}." for part in settings.parts for path in PARTS[part])
    maps = {path: module for path, module in model.named_modules() if path.startswith(inside) and _can_learn(module)}
    words = {_last_word(path) for path in maps}
    linear = {_last_word(path) for path, module in maps.items() if isinstance(module, nn.Linear)}
    problems = [_unknown(target, sorted(words)) for target in settings.targets if target not in words]
    if problems or not linear:
        raise ConfigError(
            f"LoRA settings: {', '.join(settings.parts)} has {'; and '.join(problems) or 'no linear map'}."
        )
    return [path for path in maps if _last_word(path) in (settings.targets or linear)]


def save_adapter(model: Florence2Model, folder: Path, layout: Layout | None = None) -> None:
    """Write the matrices of `add_lora` in peft's format: `adapter_config.json` and `adapter_model.safetensors`.

    `florence2.load(..., adapter=folder)` merges them, whatever the names. peft's `PeftModel.from_pretrained` loads them
    into a model whose modules have these names: this project's, or with `layout` Microsoft's or the native one of
    transformers. Raises ConfigError for a module that the layout's model does not have.
    """
    peft = _import_peft()
    if not hasattr(model, "peft_config"):
        raise ConfigError("The model has no LoRA matrices to save. Add them with `add_lora` first.")
    configs: Any = model.peft_config
    config = copy.copy(configs[_ADAPTER])
    matrices: dict[str, Tensor] = peft.get_peft_model_state_dict(model, adapter_name=_ADAPTER)
    named: dict[str, Tensor] = {}
    targets: set[str] = set()
    for key, matrix in matrices.items():
        path, _, part = key.partition(".lora_")
        targets.add(_name(path, layout))
        named[f"{_PREFIX}{_name(path, layout)}.lora_{part}"] = matrix.cpu()
    if layout is not None:
        config.target_modules = targets  # peft has shortened the canonical names
    folder.mkdir(parents=True, exist_ok=True)
    write_safetensors(folder / ADAPTER_WEIGHTS, named)
    config.save_pretrained(str(folder))


def _name(path: str, layout: Layout | None) -> str:
    name = path if layout is None else name_module(path, layout)
    if name is None:
        raise ConfigError(f"The {layout} layout has no module {path}. Save the adapter with canonical names.")
    return name


def _can_learn(module: nn.Module) -> bool:
    """Return whether LoRA can be put into a module and merged again: not into depthwise convolutions."""
    return isinstance(module, nn.Linear) or plain_class(type(module)) is nn.Conv2d


def _unknown(target: str, known: Sequence[str]) -> str:
    """Name an unknown target and the known ones that are similar."""
    near = difflib.get_close_matches(target, known, n=3, cutoff=0.5) or known
    return f"no module {target!r}" + (f", but {', '.join(near)}" if near else "")


def _last_word(path: str) -> str:
    return path.rpartition(".")[2]


def _import_peft() -> Any:
    """Import peft by name, so that type checking needs neither peft nor its dependency transformers."""
    try:
        return importlib.import_module("peft")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f'LoRA needs {error.name}, which is not installed; in a checkout of this project: pip install ".[lora]"'
        ) from None
