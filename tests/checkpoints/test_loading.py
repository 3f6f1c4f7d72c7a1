"""Devices and types by name."""

import itertools
from typing import get_args

import pytest
import torch

from florence2.checkpoints.checks.loading import Parts, check_loading, choose_device, choose_dtype
from florence2.errors import OptionError
from florence2.model.attention import AttentionKind


def test_devices_and_types() -> None:
    assert choose_device("cpu").type == "cpu" and choose_device("auto").type in ("cpu", "cuda", "mps")
    for wrong in ("tpu9", "cuda:99", "gpu"):
        with pytest.raises(OptionError, match="cannot be used here"):
            choose_device(wrong)
    with pytest.raises(
        OptionError, match=r"^The device 'xla' cannot be used here: this build of torch cannot compute on"
    ):
        choose_device("xla")
    assert choose_dtype("auto", torch.device("cpu")) == torch.float32
    assert choose_dtype("auto", torch.device("cuda")) == torch.float16
    assert choose_dtype(torch.bfloat16, torch.device("cpu")) == torch.bfloat16
    assert check_loading("cpu", "bfloat16", "eager", "vision") == (torch.device("cpu"), torch.bfloat16)
    for attention, parts in itertools.product(get_args(AttentionKind), get_args(Parts)):
        assert check_loading("cpu", "auto", attention, parts) == (torch.device("cpu"), torch.float32)
    assert check_loading("cpu", torch.float64, "sdpa", "all", exact=True)[1] == torch.float64
    with pytest.raises(OptionError, match="float64 is not supported"):
        check_loading("cpu", torch.float64, "sdpa", "all")
    with pytest.raises(OptionError, match="int8 is not supported"):
        choose_dtype("int8", torch.device("cpu"))
