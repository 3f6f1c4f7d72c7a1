"""Untrained checkpoints, for tests and benchmarks."""

from pathlib import Path

import torch
from torch import nn

from florence2.checkpoint import copy_companions, refuse_existing, save_checkpoint
from florence2.config import Florence2Config
from florence2.errors import CheckpointError
from florence2.files import write_json
from florence2.model import Florence2Model
from florence2.presets import PUBLISHED_PREPROCESSOR


def init_checkpoint(
    folder: Path, config: Florence2Config, tokenizer: Path, seed: int = 0, dtype: torch.dtype = torch.float16
) -> None:
    """Write an untrained checkpoint in Microsoft's layout, with the tokenizer files of the folder `tokenizer`.

    Weights are normal with a standard deviation of 0.02 and equal for equal `seed`; norms are identities.
    Raises CheckpointError when `folder` already holds weights or `tokenizer` holds no tokenizer.json.
    """
    refuse_existing(folder)
    if not (tokenizer / "tokenizer.json").is_file():
        raise CheckpointError(
            f"{tokenizer} holds no tokenizer.json; give a folder or Hub name of a Florence-2 checkpoint."
        )
    model = Florence2Model(config)
    _draw_weights(model, seed)
    save_checkpoint(model, folder, "microsoft", dtype)
    copy_companions(tokenizer, folder)
    if not (folder / "preprocessor_config.json").is_file():
        write_json(folder / "preprocessor_config.json", PUBLISHED_PREPROCESSOR)


def _draw_weights(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                if name == "bias":
                    parameter.zero_()
                elif isinstance(module, nn.LayerNorm):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(std=0.02, generator=generator)
