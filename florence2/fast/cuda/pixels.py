"""Images on the device: the host decodes, the device resizes and normalises. The same bits as Pillow's, and NumPy's.

The plain counterpart is `florence2.processor.HostPixels`. On a CPU Pillow takes 6 ms for 640 x 480 -> 768 x 768, three
times as long as decoding such a JPEG, and the table of 256 values 2 ms; one thread that does all this for one image
after another keeps a GPU waiting. The gain on a GPU has not been measured yet.

A pass gathers the K source pixels of each target pixel, multiplies them by Pillow's integer weights, and adds up in
int32, as Pillow does: every sum is exact, whatever its order. K is 4 where an image grows and about 4 times the scale
where it shrinks, so this costs a few readings of the image. A product with a dense float64 matrix would be exact too,
and takes fewer kernels, but most of its products are with zeros (all but K of each row), it needs eight bytes a value,
and many devices are slow in float64.
"""

import os
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from florence2.fast.cuda.pillow import BITS, coefficients, pass_order
from florence2.generation.budget import free_bytes
from florence2.inputs.arrays import MAX_PIXELS
from florence2.inputs.image import ImageConfig, normalised_values, resize_image

MAX_DEVICE_PIXELS = 1 << 24
"""Of an image that a device resizes: 48 MiB. The host resizes larger ones, so that those that wait stay small."""
MAX_DEVICE_SIDE = 1 << 14
"""Of such an image, in pixels: the weights of a side take at most 1 MiB."""
MAX_THREADS = 16
"""How many threads read images at most; at 2 ms for a JPEG of 640 x 480 they decode thousands a second."""
_KEPT = 256  # pairs of a length and its target, whose weights are kept
_PRODUCTS = 1 << 24  # that exist at one moment, of 4 bytes
_DECODED_BYTES = 8  # a pixel, while an image is decoded and converted


class DevicePixels:
    """Resizes and normalises images on the model's device. It holds nothing, so threads may share it."""

    @property
    def threads(self) -> int:
        """How many threads should read images: one for each core, up to `MAX_THREADS`.

        They are fewer where half of the free memory does not hold as many images of the largest size that is read.
        """
        free = free_bytes(torch.device("cpu"))
        fit = MAX_THREADS if free is None else free // (2 * _DECODED_BYTES * MAX_PIXELS)
        return max(1, min(os.cpu_count() or 1, MAX_THREADS, fit))

    def read(self, image: Image.Image, config: ImageConfig) -> np.ndarray:
        """Return the uint8 values (h, w, 3) of an RGB image for `pixel_values`, in any thread, without the device.

        They are those of the image itself, or resized where it is too large for the device.
        """
        small = max(image.size) <= MAX_DEVICE_SIDE and image.width * image.height <= MAX_DEVICE_PIXELS
        return np.asarray(image) if small and pass_order() is not None else resize_image(image, config)

    def pixel_values(self, images: Sequence[np.ndarray], config: ImageConfig, device: torch.device) -> Tensor:
        """Return the float32 pixel values (B, 3, H, W) on `device` of what `read` returned; nothing waits for them."""
        values = torch.stack([self._resize(_upload(image, device), config) for image in images])
        table = torch.from_numpy(normalised_values(config)).flatten()
        indices = values.to(torch.int32) + 256 * torch.arange(3, dtype=torch.int32, device=device)[:, None, None]
        return _move(table, device).index_select(0, indices.flatten()).view(values.shape)

    def _resize(self, image: Tensor, config: ImageConfig) -> Tensor:
        """Resize uint8 (h, w, 3) to (3, H, W) as Pillow does."""
        values = image.permute(2, 0, 1).contiguous()
        (height, width), order = image.shape[:2], pass_order()
        passes = [(2, width, config.width), (1, height, config.height)]
        if order is not None and order((width, height), (config.width, config.height)):
            passes.reverse()
        for axis, length, target in passes:
            if length != target:
                taps = _taps(length, target, config.resample, image.is_cuda)
                values = resize_axis(values, _move(taps, image.device), axis)
        return values


def resize_axis(values: Tensor, taps: Tensor, axis: int) -> Tensor:
    """Resize axis 1 or 2 of uint8 values (3, H, W) with `coefficients` (2, K, M) to M."""
    before, after = values.shape[:axis], values.shape[axis + 1 :]
    lines, width = values.numel() // values.shape[axis], taps.shape[1]
    parts = []
    for places, weights in torch.split(taps, max(1, _PRODUCTS // (lines * width)), dim=2):
        picked = values.index_select(axis, places.flatten()).view(*before, *places.shape, *after)  # (3, H, K, m)
        sums = (picked * weights.view(*places.shape, *(1 for _ in after))).sum(axis, dtype=torch.int32)
        parts.append(((sums + (1 << (BITS - 1))) >> BITS).clamp(0, 255).to(torch.uint8))
    return torch.cat(parts, axis)


@lru_cache(_KEPT)
def _taps(length: int, target: int, resample: int, pinned: bool) -> Tensor:
    """Return `coefficients` on the host: a tensor on the device would belong to the stream that copied it."""
    taps = torch.from_numpy(coefficients(length, target, resample))
    return taps.pin_memory() if pinned else taps


def _upload(image: np.ndarray, device: torch.device) -> Tensor:
    """Copy an array, which may be read-only, to the device."""
    # Here and not in the reading threads: a CUDA call of another thread can spoil a graph that is being recorded.
    staged = torch.empty(image.shape, dtype=torch.uint8, pin_memory=device.type == "cuda")
    staged.numpy()[...] = image
    return staged.to(device, non_blocking=True)


def _move(table: Tensor, device: torch.device) -> Tensor:
    """Copy a table to the device, from pinned memory so that nothing waits."""
    if device.type != "cuda":
        return table.to(device)
    return table.pin_memory().to(device, non_blocking=True)  # returns a pinned tensor unchanged
