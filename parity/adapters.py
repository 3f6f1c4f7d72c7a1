"""Compare LoRA: peft adds an adapter to a reference and saves it; this project merges it without peft."""

import importlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from florence2.checkpoints.adapters import merge_adapter
from florence2.checkpoints.checkpoint import load_model
from florence2.checkpoints.config_files import read_image_config
from florence2.fast.install import install
from florence2.inputs.image import image_to_array, open_image
from florence2.inputs.tokenizer import FlorenceTokenizer
from parity.cases import IMAGES, SyntheticModel
from parity.compare import MakeReference
from parity.recipe import make_checkpoint, make_picture
from parity.report import Comparison, largest_difference

_LINEAR = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2", "qkv", "proj", "image_projection"]
_TARGETS = [*_LINEAR, "conv", "row_embeddings"]
_DECODER_IDS = [2, 0, 713, 16, 10, 50286, 51268]


def compare_adapter(group: str, shape: SyntheticModel, make_reference: MakeReference) -> Iterator[Comparison]:
    """Compare in float64 the reference with the adapter next to its weights and our model with it merged."""
    with tempfile.TemporaryDirectory() as name:
        folder, adapter = Path(name) / "checkpoint", Path(name) / "adapter"
        make_checkpoint(folder, shape.config, shape.seed, shape.end_bonus, shape.size)
        ours = install(load_model(folder, dtype=torch.float64))
        reference = make_reference(folder, ours, torch.float64)
        _adapt(reference.model, adapter)
        merge_adapter(ours, adapter)
        ids = FlorenceTokenizer(folder / "tokenizer.json").encode("What does the image describe?")
        worst = dict.fromkeys(("features", "logits"), 0.0)
        for image in IMAGES:
            pixel_values = torch.from_numpy(image_to_array(open_image(make_picture(*image)), read_image_config(folder)))
            with torch.no_grad():
                features = ours.encode_image(pixel_values)
                logits = ours.decode(torch.tensor([_DECODER_IDS]), ours.encode(features, torch.tensor([ids])))
                theirs = reference.features(pixel_values), reference.logits(pixel_values, ids, _DECODER_IDS)
            worst["features"] = max(worst["features"], largest_difference(features, theirs[0]))
            worst["logits"] = max(worst["logits"], largest_difference(logits, theirs[1]))
    for stage, difference in worst.items():
        subject = f"{shape.name} / {reference.name}"
        yield Comparison(group, subject, f"{stage}, LoRA, float64", len(IMAGES), len(IMAGES), difference)


def _adapt(model: nn.Module, folder: Path) -> None:
    """Add an adapter to `model`, with matrices like those after training, and save it."""
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=True, target_modules=_TARGETS, rank_pattern={"fc1": 2}, alpha_pattern={"qkv": 3}
    )
    adapted = peft.get_peft_model(model, config).eval()
    generator = torch.Generator().manual_seed(11)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                parameter.normal_(0, 0.1, generator=generator)
    adapted.save_pretrained(folder)
