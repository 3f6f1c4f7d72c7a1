"""The checkpoint and the images that a benchmark measures."""

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import florence2
from florence2.checkpoints.checkpoint import save_checkpoint
from florence2.checkpoints.config_files import parse_image_config
from florence2.checkpoints.presets import PUBLISHED_PREPROCESSOR, preset
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.model.config import Florence2Config
from florence2.model.davit import ChannelAttention, DepthwiseConv, Mlp, WindowAttention
from florence2.model.florence2 import Florence2Model
from florence2.pipeline import Florence2
from florence2.processor import Processor
from parity.recipe import GOLDEN, make_checkpoint, make_model, make_picture

SEED = 29
BRANCH_SCALE = 0.1
"""Of what the vision tower adds to its residual stream, which unscaled reaches 3e9 in base; float16 ends at 65,504."""
_ATTENTIONS = (WindowAttention, ChannelAttention)


def add_subject_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that `load_subject` reads."""
    parser.add_argument("--model", help="a checkpoint: name, OWNER/NAME or folder; synthetic weights without it")
    parser.add_argument("--preset", default="base", help="the shape of the synthetic weights: base or large (base)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=("float32", "float16", "bfloat16"))


def load_subject(options: argparse.Namespace) -> Florence2:
    """Load the checkpoint that `--model` names, or make one of the shape `--preset` whose answers never end early."""
    if options.model:
        return florence2.load(options.model, device=options.device, dtype=options.dtype)
    model = make_subject(preset(options.preset), end_bonus=-50.0)
    tokenizer = FlorenceTokenizer(GOLDEN / "tokenizer.json")
    images = parse_image_config(PUBLISHED_PREPROCESSOR)
    dtype = getattr(torch, options.dtype)
    return Florence2(model.to(options.device, dtype), Processor(tokenizer, images))


def make_synthetic_checkpoint(name: str, folder: Path) -> Path:
    """Write synthetic weights of the preset `name`, which can be converted to either layout, and return the folder."""
    make_checkpoint(folder, preset("tiny"), seed=0, end_bonus=0.0)  # tokenizer and preprocessor settings
    model = make_subject(preset(name), end_bonus=0.0)
    model.final_logits_bias.zero_()  # the native layout has no place for it
    save_checkpoint(model, folder, "microsoft", torch.float16)
    return folder


@torch.no_grad()
def make_subject(config: Florence2Config, end_bonus: float) -> Florence2Model:
    """Make a model with synthetic weights whose activations float16 can hold."""
    model = make_model(config, SEED, end_bonus)
    for part in model.vision_tower.modules():
        last = part.fc2 if isinstance(part, Mlp) else part.proj if isinstance(part, _ATTENTIONS) else part
        if isinstance(last, DepthwiseConv) or last is not part:
            assert isinstance(last, nn.Conv2d | nn.Linear)
            for parameter in last.parameters():
                parameter.mul_(BRANCH_SCALE)
    return model


def default_image() -> Image.Image:
    """Draw the synthetic image of 640 x 480 that every benchmark uses unless a file is given."""
    return make_picture(31, 640, 480)


def write_jpegs(image: Image.Image, count: int, folder: Path) -> list[str]:
    """Write `count` different JPEG files, the same image turned by different angles, and return their paths."""
    paths = []
    for i in range(count):
        paths.append(str(folder / f"{i}.jpg"))
        image.rotate(360.0 * i / count).save(paths[-1], quality=92)
    return paths
