"""Pictures that clients sent, as tensors of the size at which an image is drawn."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from hypergen.request import Picture

_HALF = 128  # of 255: from here on a pixel of a mask counts as drawn


def fit(picture: Picture, width: int, height: int) -> np.ndarray:
    """The picture at the drawn size, so that cutting or resizing the drawn image gives its place back.

    Where the drawn size is a little larger, its edges are repeated outwards, as the drawn image loses its
    edges again; else it is resized.

    Returns:
        uint8, shape (height, width, 3), or (height, width) of a mask.
    """
    pixels = np.frombuffer(picture.pixels, np.uint8).reshape(picture.height, picture.width, -1)
    if picture.width <= width < 2 * picture.width and picture.height <= height < 2 * picture.height:
        left, top = (width - picture.width) // 2, (height - picture.height) // 2
        right, bottom = width - picture.width - left, height - picture.height - top
        fitted = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), mode="edge")
    else:
        image = Image.fromarray(np.squeeze(pixels, 2) if pixels.shape[2] == 1 else pixels)
        resized = image.resize((width, height), Image.Resampling.LANCZOS)
        fitted = np.asarray(resized).reshape(height, width, -1)
    return fitted[:, :, 0] if fitted.shape[2] == 1 else fitted


def to_image(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W, 3), to -1..1, shape (1, 3, H, W): what an encoder reads."""
    return 2.0 * to_unit(pixels) - 1.0


def to_unit(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W, 3), to 0..1, shape (1, 3, H, W): what a control model reads."""
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)[None].contiguous()


def to_mask(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W), to 0 (keep) and 1 (draw), shape (1, 1, H, W)."""
    return torch.from_numpy((pixels >= _HALF).astype(np.float32))[None, None]
