"""The settings of loading a model: where it computes, in which type, with which attention, and which parts of it."""

from typing import Literal, get_args

import torch

from florence2.errors import OptionError, shown

Parts = Literal["all", "encoder", "vision"]
"""The parts of a model that are loaded: "vision" is the vision tower and the projection, "encoder" adds the token
embedding and the text encoder, "all" adds the decoder."""

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_ATTENTION = ("sdpa", "eager")


def check_loading(
    device: str | torch.device, dtype: str | torch.dtype, attention: str, parts: str, exact: bool = False
) -> tuple[torch.device, torch.dtype]:
    """Check the settings of `load` and `load_model` before any file is read; return the device and the type.

    Args:
        device: "auto" (CUDA, then Apple's MPS, then the CPU) or a torch device.
        dtype: "auto" (float32 on a CPU, float16 elsewhere), or one of `DTYPES` by name or as a torch type.
        attention: "sdpa" (torch's kernel) or "eager" (written out).
        parts: "all", "encoder" or "vision".
        exact: Allow torch.float64 too, which serves comparisons and files that hold it.

    Raises:
        OptionError: A value is unknown, or the device does not exist on this machine.
    """
    _check_choice("attention", attention, _ATTENTION)
    _check_choice("parts", parts, get_args(Parts))
    chosen = choose_device(device)
    return chosen, torch.float64 if exact and dtype == torch.float64 else choose_dtype(dtype, chosen)


def choose_device(device: str | torch.device) -> torch.device:
    """Return the device of that name; "auto" is CUDA, MPS or the CPU. Raises OptionError when it cannot be used."""
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen).tolist()  # fails on a device without memory, such as "meta"
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        # of a backend that is not part of this torch, torch says so in a page of text
        missing = isinstance(error, NotImplementedError)
        reason = "this build of torch cannot compute on it" if missing else str(error).split("\n")[0].rstrip(".")
        raise OptionError(
            f"The device {str(device)!r} cannot be used here: {reason}. Choose auto, cpu, cuda, cuda:N or mps."
        ) from None
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """Return the type of that name; "auto" depends on the device. Raises OptionError for any other than the three."""
    if isinstance(dtype, str) and dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise OptionError(f"The type {dtype!s} is not supported; choose one of auto, {', '.join(DTYPES)}.")
    return chosen


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Refuse a value that is not one of the `allowed`."""
    if not isinstance(value, str) or value not in allowed:
        raise OptionError(f"{name} is {shown(value)}; it must be one of {', '.join(allowed)}.")
