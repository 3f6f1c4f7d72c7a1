"""The checkpoint and the images that a benchmark measures."""

import argparse
from pathlib import Path

import torch
from PIL import Image

import florence2
from florence2.checkpoints.checkpoint import save_checkpoint
from florence2.checkpoints.config_files import parse_image_config
from florence2.checkpoints.presets import PUBLISHED_PREPROCESSOR, preset
from florence2.inputs.tokenizer import FlorenceTokenizer
from florence2.pipeline import Florence2
from florence2.processor import Processor
from parity.recipe import GOLDEN, make_checkpoint, make_model, make_picture

SEED = 29


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
    model = make_model(preset(options.preset), seed=SEED, end_bonus=-50.0)
    tokenizer = FlorenceTokenizer(GOLDEN / "tokenizer.json")
    images = parse_image_config(PUBLISHED_PREPROCESSOR)
    dtype = getattr(torch, options.dtype)
    return Florence2(model.to(options.device, dtype), Processor(tokenizer, images))


def make_synthetic_checkpoint(name: str, folder: Path) -> Path:
    """Write synthetic weights of the preset `name`, which can be converted to either layout, and return the folder."""
    make_checkpoint(folder, preset("tiny"), seed=0, end_bonus=0.0)  # tokenizer and preprocessor settings
    model = make_model(preset(name), seed=SEED, end_bonus=0.0)
    model.final_logits_bias.zero_()  # the native layout has no place for it
    save_checkpoint(model, folder, "microsoft", torch.float16)
    return folder


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
