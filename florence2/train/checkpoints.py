"""The state of a run on disk, from which it resumes to the bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from florence2.checkpoints.files import written_whole
from florence2.errors import CheckpointError, ConfigError

STATE = "state.pt"


@dataclass(frozen=True)
class TrainState:
    """A run after `step` updates: the parameters that are trained, and the optimizer's state."""

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]


def capture_state(module: nn.Module, optimizer: Any, step: int) -> TrainState:
    """Copy the trained parameters and the optimizer's state after `step` updates."""
    parameters = {name: p.detach().cpu().clone() for name, p in module.named_parameters() if p.requires_grad}
    return TrainState(step, parameters, optimizer.state_dict())


def restore_state(module: nn.Module, optimizer: torch.optim.Optimizer, state: TrainState) -> None:
    """Put a state back. Raise ConfigError when it belongs to other parameters than those that train now."""
    parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if parameters.keys() != state.parameters.keys():
        raise ConfigError("The saved state trains other parameters than this run would. Use another folder.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
    optimizer.load_state_dict(state.optimizer)


def save_state(folder: Path, state: TrainState) -> None:
    """Replace the state in `folder`. A kill in between leaves the old one.

    Raises CheckpointError when it cannot be written.
    """
    values = {"step": state.step, "parameters": state.parameters, "optimizer": state.optimizer}
    try:
        with written_whole(folder / STATE) as path:
            torch.save(values, path)
    except RuntimeError as error:  # torch reports a full disk so
        raise CheckpointError(
            f"The state of step {state.step} cannot be written to {folder} ({error}). If the disk is full, make room "
            "and give the same command again: the run resumes from the state saved before."
        ) from None


def load_state(folder: Path) -> TrainState | None:
    """Load the state in `folder`; return None when it has none. Raise CheckpointError for a damaged file."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return TrainState(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001  torch raises almost anything for a damaged file
        raise CheckpointError(
            f"{path} is not the state of a training run ({error}). Remove it to start from the beginning."
        ) from None
