"""Turns exceptions of the model or the device into the error that the client of a request receives."""

from __future__ import annotations

import logging

import torch

from hypergen.errors import GenerationError, OutOfMemoryError, RequestError
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

_OUT_OF_MEMORY = ("ALLOC_FAILED", "out of memory", "not enough memory")


def as_request_error(error: Exception, request: GenerationRequest) -> RequestError:
    """The client's error for an exception; the details are logged.

    Raises:
        torch.AcceleratorError: the error itself, because the device is lost.
    """
    if isinstance(error, RequestError):
        return error
    if isinstance(error, torch.AcceleratorError) and not is_out_of_memory(error):
        raise error
    logger.error("Request %s failed.", request.id, exc_info=error)
    if is_out_of_memory(error):
        free_cached_memory()
        size = f"{request.width}x{request.height}"
        return OutOfMemoryError(
            f"Out of memory while generating a {size} image, even with batch size 1; request a smaller size."
        )
    return GenerationError("The image could not be generated; see the server's log for details.")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had too little memory, as CUDA, its libraries and other devices say it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _OUT_OF_MEMORY)


def free_cached_memory() -> None:
    """Give the memory that torch keeps back to the device."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()
