"""Devices and types by name."""

import pytest
import torch

from florence2.devices import choose_device, choose_dtype
from florence2.errors import OptionError


def test_devices_and_types() -> None:
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("tpu9", "cuda:99", "gpu"):
        with pytest.raises(OptionError, match="cannot be used here"):
            choose_device(wrong)
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    with pytest.raises(OptionError, match="int8 is not supported"):
        choose_dtype("int8", torch.device("cpu"))
