"""Preprocessors of control images."""

from __future__ import annotations

import numpy as np

# Thresholds of diffusers' documentation, for pixel values 0..255.
_LOW, _HIGH = 100, 200


def canny(pixels: np.ndarray) -> np.ndarray:
    """Canny edges, white on black: uint8, shape (H, W, 3), in and out.

    Source: Canny 1986, https://doi.org/10.1109/TPAMI.1986.4767851; OpenCV's implementation.
    """
    import cv2  # imported on first use: most servers never need it

    edges = cv2.Canny(np.ascontiguousarray(pixels), _LOW, _HIGH)
    return np.repeat(edges[:, :, None], 3, axis=2)
