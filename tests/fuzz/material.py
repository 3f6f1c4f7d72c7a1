"""Material that cases spoil: a tiny checkpoint, its parts as values and bytes, small images. Made once a process."""

import json
import os
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

import florence2
from florence2.checkpoints.checkpoint import save_checkpoint
from florence2.processor import Processor
from recipes.nano.train import make_model, nano_config
from tests.two_stages import two_stages

NANO = Path(__file__).parents[2] / "weights" / "nano"
SIDE = 64


@cache
def folder() -> Path:
    """A checkpoint of 182,176 weights with nano's tokenizer, for images of 64 x 64 pixels. Do not write to it."""
    place = Path(tempfile.mkdtemp(prefix="material-")) / "mini"
    place.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(NANO / name, place / name)
    settings = json.loads((NANO / "preprocessor_config.json").read_text(encoding="utf-8"))
    settings |= {"size": {"height": SIDE, "width": SIDE}, "image_seq_length": 65}
    (place / "preprocessor_config.json").write_text(json.dumps(settings), encoding="utf-8")
    processor = Processor.from_folder(place)
    config = nano_config(processor.tokenizer.vocab_size)
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 256}
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    config = replace(config, vision=two_stages(config.vision), text=replace(config.text, **heads, **sizes))
    save_checkpoint(make_model(config, processor, seed=3), place, dtype=torch.float32)
    return place


@cache
def model() -> florence2.Florence2:
    """The same, loaded. Do not change it."""
    return florence2.load(folder(), device="cpu")


@cache
def original(name: str) -> bytes:
    """The bytes of one of its files."""
    return (folder() / name).read_bytes()


def json_of(name: str) -> Any:
    """The values of one of its JSON files, a new copy each time."""
    return json.loads(original(name))


@cache
def weights() -> dict[str, torch.Tensor]:
    """Its tensors by stored name. Do not change them."""
    from safetensors.torch import load_file

    return load_file(folder() / "model.safetensors")


def copy(place: Path, *left_out: str) -> Path:
    """Copy the checkpoint into a folder; large files are linked, so replace them and never write into them."""
    place.mkdir(parents=True, exist_ok=True)
    for file in folder().iterdir():
        if file.name not in left_out:
            os.link(file, place / file.name)
    return place


def put(file: Path, data: bytes) -> Path:
    """Write a file in place of the link that may be there."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.write_bytes(data)
    return file


def drawing(number: int, width: int = 48, height: int = 32) -> Image.Image:
    """A small image with a disc; each number has another one."""
    image = Image.new("RGB", (width, height), (240, 240 - number % 50, 230))
    left = 3 + number % 17
    ImageDraw.Draw(image).ellipse((left, 4, left + 20, 25), fill=(220, 30 + number % 100, 30))
    return image
