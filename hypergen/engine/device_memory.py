"""The memory of this engine, for metrics."""

from __future__ import annotations

import psutil
import torch


def memory_bytes() -> dict[str, int]:
    """Bytes that torch allocated and reserved on a CUDA device, and its total; else the resident memory."""
    if torch.cuda.is_available():
        return {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "total": torch.cuda.get_device_properties(0).total_memory,
        }
    return {"resident": psutil.Process().memory_info().rss}
