"""`f.processor`: the processor that hands out tensors, and where images are resized."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from florence2.asking.processor import AnswerProcessor
from florence2.inputs.image import Colour, ImageConfig, ImageInput, normalise, resize_image


class HostPixels:
    """Resizes images on the host where they are read, and normalises them there. It holds nothing."""

    threads = 1
    """How many threads should read images: one, since a model on a CPU uses all cores."""

    def read(self, image: Image.Image, config: ImageConfig) -> np.ndarray:
        """Return the uint8 values (H, W, 3) of an RGB image for `pixel_values`, in any thread."""
        return resize_image(image, config)

    def pixel_values(self, images: Sequence[np.ndarray], config: ImageConfig, device: torch.device) -> torch.Tensor:
        """Return the float32 pixel values (B, 3, H, W) on `device` of what `read` returned, here or elsewhere."""
        size = (config.height, config.width)
        resized = [each if each.shape[:2] == size else resize_image(Image.fromarray(each), config) for each in images]
        return torch.from_numpy(normalise(resized, config)).to(device)


class Processor(AnswerProcessor):
    """Tokenizer, image settings and tasks of one checkpoint, with tensors for a model. Immutable; threads share it."""

    def image(self, source: ImageInput, background: Colour | None = None) -> torch.Tensor:
        """Return the pixel values of an image.

        Args:
            source: A path, the bytes of an image file, a Pillow image or an array (see `open_image`).
            background: The colour that transparent pixels show; None is the processor's own.

        Returns:
            float32 (1, 3, H, W), resized to the checkpoint's H and W, and normalised.

        Raises:
            ImageError: The image cannot be read.
        """
        return torch.from_numpy(self.image_array(source, background))
