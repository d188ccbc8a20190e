"""Canny: a picture's edges, white on black, for control models that were trained on them."""

from __future__ import annotations

import numpy as np

# Those of diffusers' documentation, for pictures in 0..255.
_LOW, _HIGH = 100, 200


def canny(pixels: np.ndarray) -> np.ndarray:
    """Edges of a picture: uint8, shape (H, W, 3), in and out.

    Source: Canny 1986, https://doi.org/10.1109/TPAMI.1986.4767851, by OpenCV.
    """
    import cv2  # not at the start of an engine, which most requests do not need it for

    edges = cv2.Canny(np.ascontiguousarray(pixels), _LOW, _HIGH)
    return np.repeat(edges[:, :, None], 3, axis=2)
