"""Failures: what went wrong in the model or the device, as the client hears of it."""

from __future__ import annotations

import logging

import torch

from hypergen.errors import GenerationError, OutOfMemoryError, RequestError
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)


def as_request_error(error: Exception, request: GenerationRequest) -> RequestError:
    """The error of one request; the details go to the log.

    Raises:
        torch.AcceleratorError: the error itself, when the device answers nothing any more.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, torch.AcceleratorError):
        raise error
    logger.error("Request %s failed.", request.id, exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        size = f"{request.width}x{request.height}"
        return OutOfMemoryError(
            f"CUDA out of memory while drawing {size}, even alone; ask for a smaller size."
        )
    return GenerationError("The picture could not be drawn; the server's log says why.")
