"""Compare nano with transformers' model whose weights this file renames itself.

The other comparisons with the native model convert weights by the code that they test: an error that this package makes
in both directions would be the same on both sides. Here the file's tensors are renamed by a plain table.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from florence2.checkpoints.hub import resolve
from florence2.loading import load
from parity.recipe import make_picture
from parity.report import Comparison, largest_difference

TABLE = (
    (r"^language_model\.model\.", "model.language_model."),
    (r"^language_model\.lm_head\.", "lm_head."),
    (r"^image_projection$", "model.multi_modal_projector.image_projection.weight"),
    (r"^image_pos_embed\.", "model.multi_modal_projector.image_position_embed."),
    (r"^(image_proj_norm|visual_temporal_embed)\.", r"model.multi_modal_projector.\1."),
    (r"^vision_tower\.", "model.vision_tower."),
    (r"\.convs\.(\d+)\.proj\.", r".convs.\1.conv."),
    (r"\.(conv\d)\.fn\.dw\.", r".\1."),
    (r"\.(window_attn|channel_attn)\.norm\.", ".norm1."),
    (r"\.(window_attn|channel_attn)\.fn\.", r".\1."),
    (r"\.ffn\.norm\.", ".norm2."),
    (r"\.ffn\.fn\.net\.", ".ffn."),
)
"""Names in Microsoft's layout, by regular expressions one after another, and native ones."""
_PROMPTS = ([0, 2], [0, 300, 301, 302, 303, 304, 2])
_DECODER_IDS = [2, 0, 400, 650, 1000, 1200, 900, 7, 8, 9]


def compare_renamed() -> Iterator[Comparison]:
    """Compare logits in float64, over images and prompts."""
    f, theirs = load("nano", device="cpu"), _native(Path(resolve("nano")))
    ours, differences = f.model.double(), []
    for seed in range(3):
        pixel_values = f.processor.image(make_picture(seed, 300, 200)).double()
        for ids in _PROMPTS:
            with torch.no_grad():
                logits = ours(pixel_values, torch.tensor([ids]), torch.tensor([_DECODER_IDS]))
                differences.append(largest_difference(logits, _logits(theirs, pixel_values, ids)))
    count = len(differences)
    subject = "nano, renamed by a table of its own / native"
    yield Comparison("nano", subject, "logits, renamed, float64", count, count, max(differences))


def _native(folder: Path) -> Any:
    """Return transformers' model with the tensors of the file; every one must have its place."""
    from safetensors.torch import load_file
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    config = json.loads((folder / "config.json").read_text())
    vision = config["vision_config"]
    vision |= {
        "embed_dim": vision["dim_embed"],
        "max_position_embeddings": vision["image_pos_embed"]["max_pos_embeddings"],
    }
    del vision["model_type"]
    tensors = load_file(folder / "model.safetensors")
    bias = tensors.pop("language_model.final_logits_bias")
    tensors["image_projection"] = tensors["image_projection"].T
    model: Any = Florence2ForConditionalGeneration(
        Florence2Config(text_config=config["text_config"], vision_config=vision)
    )
    wrong = model.load_state_dict({_renamed(name): tensor for name, tensor in tensors.items()}, strict=False)
    assert not wrong.unexpected_keys and all("embed_tokens" in name for name in wrong.missing_keys), wrong
    model.lm_head.bias = torch.nn.Parameter(bias[0].float())
    return model.double().eval()


def _renamed(name: str) -> str:
    for pattern, replacement in TABLE:
        name = re.sub(pattern, replacement, name)
    return name


def _logits(model: Any, pixel_values: Tensor, ids: list[int]) -> Tensor:
    """Return logits (1, T, V); image tokens and prompt are joined here, as the paper says."""
    inner = model.model
    image = inner.multi_modal_projector(inner.vision_tower(pixel_values).last_hidden_state)
    embeddings = torch.cat([image, inner.language_model.shared(torch.tensor([ids]))], dim=1)
    decoder = torch.tensor([_DECODER_IDS])
    hidden = inner.language_model(inputs_embeds=embeddings, decoder_input_ids=decoder).last_hidden_state
    logits: Tensor = model.lm_head(hidden)
    return logits
