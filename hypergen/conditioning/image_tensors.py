"""Input images at the generation size (`images/geometry.py`), as tensors."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_HALF = 128  # of 255: from here on a pixel of a mask counts as drawn


def to_image(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W, 3), to -1..1, shape (1, 3, H, W): what an encoder reads."""
    return 2.0 * to_unit(pixels) - 1.0


def to_unit(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W, 3), to 0..1, shape (1, 3, H, W): what a control model reads."""
    return torch.from_numpy(pixels.astype(np.float32) / 255.0).permute(2, 0, 1)[None].contiguous()


def to_mask(pixels: np.ndarray) -> Tensor:
    """From 0..255, shape (H, W), to 0 (keep) and 1 (draw), shape (1, 1, H, W)."""
    return torch.from_numpy((pixels >= _HALF).astype(np.float32))[None, None]
