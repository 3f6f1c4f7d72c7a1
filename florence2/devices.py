"""Where a model computes, and in which type."""

import torch

from florence2.errors import OptionError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" or a torch device name -> the device. Raises OptionError when it does not exist here."""
    if device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen).tolist()  # which a device without memory, such as "meta", refuses
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise OptionError(f"The device {str(device)!r} cannot be used here: {reason}") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" or the name of a type -> the type. Raises OptionError for others than the three in use."""
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.float16
    chosen = DTYPES.get(str(dtype).removeprefix("torch."))
    if chosen is None:
        raise OptionError(f"The type {dtype!s} is not supported; choose one of auto, {', '.join(DTYPES)}.")
    return chosen
