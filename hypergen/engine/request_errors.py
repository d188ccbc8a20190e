"""Turns exceptions of the model or the device into the error that the client of a request receives."""

from __future__ import annotations

import logging

import torch

from hypergen.errors import GenerationError, OutOfMemoryError, RequestError
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)


def as_request_error(error: Exception, request: GenerationRequest) -> RequestError:
    """The client's error for an exception; the details are logged.

    Raises:
        torch.AcceleratorError: the error itself, because the device is lost.
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
            f"CUDA out of memory while generating a {size} image, even with batch size 1; "
            "request a smaller size."
        )
    return GenerationError("The image could not be generated; see the server's log for details.")
