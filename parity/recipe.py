"""Synthetic checkpoints and images that anyone can make again, bit for bit; the recorded outputs belong to them.

A weight is a function of its name in Microsoft's layout, its shape and a seed. So the checkpoint of a recorded output
need not be stored.
"""

import math
import shutil
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from florence2.checkpoints.checkpoint import save_checkpoint
from florence2.checkpoints.files import write_json
from florence2.checkpoints.layouts import TRANSPOSED, from_canonical
from florence2.checkpoints.presets import PUBLISHED_PREPROCESSOR
from florence2.model.config import Florence2Config
from florence2.model.florence2 import Florence2Model

GOLDEN = Path(__file__).parent / "golden"
_LOCATIONS = slice(50269, 51269)


def make_weight(name: str, shape: tuple[int, ...], seed: int, end_bonus: float) -> np.ndarray:
    """Make the float32 values of one tensor from its name in Microsoft's layout.

    The scales keep activations of order one through any depth. `end_bonus` raises the logit of `</s>`, so that beams
    end, at different lengths; location tokens are raised by 3, so that they occur.
    """
    if name == "visual_temporal_embed.pos_idx_to_embed":
        return _sinusoids(*shape)
    noise = np.random.Generator(np.random.PCG64([seed, zlib.crc32(name.encode())])).standard_normal(shape, np.float32)
    if name == "language_model.final_logits_bias":
        bias = noise * 0.1
        bias[0, 2] += end_bonus
        bias[0, _LOCATIONS] += 3.0
        return bias
    if "norm" in name:
        return 1.0 + 0.1 * noise if name.endswith("weight") else 0.1 * noise
    if name.endswith("bias"):
        return 0.05 * noise
    if any(table in name for table in ("embed_positions", "row_embeddings", "column_embeddings")):
        return 0.3 * noise
    if name == "language_model.model.shared.weight":
        return noise * (4.0 / math.sqrt(shape[1]))
    if name == "image_projection":
        return noise / math.sqrt(shape[0])
    fan_in = int(np.prod(shape[1:]))
    return noise * (1.4 / math.sqrt(fan_in))


def _sinusoids(length: int, channels: int) -> np.ndarray:
    step = np.exp(-math.log(10000.0) * np.arange(0, channels, 2, dtype=np.float32) / channels)
    angles = np.arange(length, dtype=np.float32)[:, None] * step
    return np.stack([np.sin(angles), np.cos(angles)], axis=-1).reshape(length, channels).astype(np.float32)


def make_model(config: Florence2Config, seed: int, end_bonus: float) -> Florence2Model:
    """Make a model with the tensors of `make_weight`."""
    model = Florence2Model(config)
    weights = {}
    for canonical, tensor in model.state_dict().items():
        flip = canonical in TRANSPOSED["microsoft"]
        shape = tuple(tensor.shape)[::-1] if flip else tuple(tensor.shape)
        name = from_canonical(canonical, "microsoft")
        assert name is not None
        value = torch.from_numpy(make_weight(name, shape, seed, end_bonus))
        weights[canonical] = value.T.contiguous() if flip else value
    model.load_state_dict(weights, assign=True)
    return model.eval()


def make_checkpoint(
    folder: Path,
    config: Florence2Config,
    seed: int,
    end_bonus: float,
    size: tuple[int, int] = (768, 768),
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a synthetic checkpoint in Microsoft's layout; `size` is (height, width) in pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(make_model(config, seed, end_bonus), folder, "microsoft", dtype)
    settings = {**PUBLISHED_PREPROCESSOR, "size": {"height": size[0], "width": size[1]}}
    settings["image_seq_length"] = config.vision.image_tokens(*size)
    write_json(folder / "preprocessor_config.json", settings)
    shutil.copyfile(GOLDEN / "tokenizer.json", folder / "tokenizer.json")


def make_picture(seed: int, width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Draw smooth shading, hard-edged blocks and noise, in any mode of Pillow (RGBA with an alpha ramp)."""
    rng = np.random.Generator(np.random.PCG64(seed))
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    shades = [127.5 + 80 * np.sin(x / (9 + 7 * c) + seed) * np.cos(y / (11 + 5 * c)) for c in range(3)]
    pixels = np.stack(shades, -1)
    for _ in range(12):
        left, top = rng.integers(0, width), rng.integers(0, height)
        across, down = rng.integers(width // 16 + 1, width // 3 + 2), rng.integers(height // 16 + 1, height // 3 + 2)
        pixels[top : top + down, left : left + across] = rng.integers(0, 256, 3)
    pixels += rng.normal(0, 6, pixels.shape)
    image = Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))
    if mode == "RGBA":
        image.putalpha(Image.fromarray(((x + y) % 256).astype(np.uint8)))
        return image
    return image if mode == "RGB" else image.convert(mode)
