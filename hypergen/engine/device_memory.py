"""The memory of this engine, for metrics and the log."""

from __future__ import annotations

import psutil
import torch


def memory_bytes() -> dict[str, int]:
    """Resident bytes of the process; on CUDA also what torch allocated and reserved, and the GPU's total."""
    memory = {"resident": psutil.Process().memory_info().rss}
    if torch.cuda.is_initialized():
        memory |= {
            "allocated": torch.cuda.memory_allocated(),
            "reserved": torch.cuda.memory_reserved(),
            "total": torch.cuda.get_device_properties(0).total_memory,
        }
    return memory
