"""Input images at the generation size (`images/geometry.py`), as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_THRESHOLD = 128  # of 255: mask pixels from here on are generated


def to_image(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W, 3), to -1..1, shape (1, 3, H, W), for the VAE."""
    return 2.0 * to_unit(pixels) - 1.0


def to_unit(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W, 3), to 0..1, shape (1, 3, H, W), for a ControlNet."""
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)[None].contiguous()


def to_mask(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W), to 0 (keep) and 1 (generate), shape (1, 1, H, W)."""
    return torch.from_numpy((pixels >= _THRESHOLD).astype(np.float32))[None, None]
