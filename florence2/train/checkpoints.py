"""The state of a run on disk, from which it resumes to the bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from florence2.checkpoints.checks.pickles import check_pickle
from florence2.checkpoints.files import written_whole
from florence2.errors import CheckpointError, ConfigError, shown

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
    """Put a state back.

    Raises ConfigError when it belongs to other parameters than those that train now, or to another optimizer.
    """
    parameters: dict[str, Tensor] = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if parameters.keys() != state.parameters.keys():
        raise ConfigError("The saved state trains other parameters than this run would. Use another folder.")
    for name, parameter in parameters.items():
        saved = state.parameters[name]
        if not isinstance(saved, Tensor) or saved.shape != parameter.shape or not torch.isfinite(saved).all():
            raise ConfigError(f"The saved state holds no values of {name} that fit this run. Use another folder.")
    if not _fits(optimizer, state.optimizer):
        raise ConfigError(
            "The saved state belongs to another optimizer than this run's, or holds values that are not finite. "
            "Use another folder."
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(state.parameters[name])
    # the groups are this run's: those of a state have been found to be the same
    optimizer.load_state_dict({**state.optimizer, "param_groups": optimizer.state_dict()["param_groups"]})


def _fits(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> bool:
    """Return whether a saved optimizer has the same groups and, for each parameter, finite values of its shape."""
    own = optimizer.state_dict()["param_groups"]
    try:
        same = [_settings(group) for group in saved["param_groups"]] == [_settings(group) for group in own]
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        moments = [(parameters[place], values) for place, values in saved["state"].items()]
        return same and all(
            values.keys() == {"step", "exp_avg", "exp_avg_sq"}
            and values["step"].numel() == 1
            and all(values[name].shape == parameter.shape for name in ("exp_avg", "exp_avg_sq"))
            and all(bool(torch.isfinite(value).all()) for value in values.values())
            for parameter, values in moments
        )
    except (AttributeError, IndexError, KeyError, TypeError):
        return False


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """Return what a group of parameters must have in common with a saved one."""
    # the learning rate is set at each step, and how AdamW is computed changes its result by rounding alone
    return {name: value for name, value in group.items() if name not in ("lr", "fused", "foreach")}


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
        check_pickle(path)
        state = TrainState(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001  torch raises almost anything for a damaged file
        raise _damaged(path, str(error)) from None
    parts = (state.parameters, state.optimizer)
    if type(state.step) is not int or state.step < 0 or not all(isinstance(part, dict) for part in parts):
        raise _damaged(path, f"its step is {shown(state.step)}")
    return state


def _damaged(path: Path, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is not the state of a training run ({reason}). Remove it to start from the beginning."
    )
