"""Spoil scenes as bad cameras, printers and networks do, to see how answers and their confidence fare."""

import io
import random

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SPOILT = ("noise", "blur", "jpeg", "occlusion")


def spoil(image: Image.Image, rng: random.Random) -> Image.Image:
    """Return a copy with noise, blurred, as a poor JPEG, or partly covered, each as likely and mild to severe."""
    return _SPOIL[rng.choice(SPOILT)](image, rng)


def _noise(image: Image.Image, rng: random.Random) -> Image.Image:
    """Add normal noise of a standard deviation of 15 to 60 of 255."""
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(15, 60), (image.height, image.width, 3))
    return Image.fromarray(np.clip(np.asarray(image, np.float32) + noise, 0, 255).astype(np.uint8))


def _blur(image: Image.Image, rng: random.Random) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(rng.uniform(1.5, 5)))


def _jpeg(image: Image.Image, rng: random.Random) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=rng.randint(3, 15))
    return Image.open(buffer).convert("RGB")


def _occlusion(image: Image.Image, rng: random.Random) -> Image.Image:
    """Cover a few places with the background's colour: in any other, a cover would itself be a shape to find."""
    border = np.asarray(image)[:2].reshape(-1, 3)
    color = tuple(int(value) for value in np.median(border, axis=0))
    covered = image.copy()
    draw = ImageDraw.Draw(covered)
    for _ in range(rng.randint(2, 5)):
        x, y = rng.uniform(0, image.width), rng.uniform(0, image.height)
        half_w, half_h = (rng.uniform(0.05, 0.15) * side for side in image.size)
        draw.rectangle((x - half_w, y - half_h, x + half_w, y + half_h), fill=color)
    return covered


_SPOIL = {"noise": _noise, "blur": _blur, "jpeg": _jpeg, "occlusion": _occlusion}
