"""Where a run stands, on disk: written whole, read back to the bit."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from florence2.checkpoints.files import written_whole
from florence2.errors import CheckpointError

STATE = "state.pt"


@dataclass(frozen=True)
class TrainState:
    """After `step` updates: the parameters that are trained, and the optimizer's state."""

    step: int
    parameters: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def save_state(folder: Path, state: TrainState) -> None:
    """Replace the state in `folder`; a kill in between leaves the old one.

    Raises CheckpointError when it cannot be written.
    """
    values = {"step": state.step, "parameters": state.parameters, "optimizer": state.optimizer}
    try:
        with written_whole(folder / STATE) as path:
            torch.save(values, path)
    except RuntimeError as error:  # as which torch reports a full disk
        raise CheckpointError(
            f"The state of step {state.step} cannot be written to {folder} ({error}); is the disk full? Make room, and "
            "give the same command again: it goes on from the state saved before."
        ) from None


def load_state(folder: Path) -> TrainState | None:
    """The state that `folder` holds, None when there is none. Raises CheckpointError for a file that is not one."""
    path = folder / STATE
    if not path.is_file():
        return None
    try:
        return TrainState(**torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # noqa: BLE001  torch raises almost anything for a damaged file
        raise CheckpointError(
            f"{path} is not the state of a training run ({error}); remove it to start anew."
        ) from None
