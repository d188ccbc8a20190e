"""Reading: prompts of requests that are yet to come in, encoded beside the steps of the others."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from hypergen.models.family import Family
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

# Held while a prompt is read and while a model is loaded: loading libraries set torch's default dtype, and do
# so for all threads.
quiet = threading.Lock()


class PromptReader:
    """Encodes prompts in a thread of its own, one after another; on CUDA on a stream of its own.

    The bits are those of the engine's thread: each text is still encoded alone, by the same kernels.
    """

    def __init__(self, family: Family) -> None:
        self._family = family
        self._closed = False
        # As many threads of torch's as the engine has, because kernels may choose by their number.
        self._thread = ThreadPoolExecutor(
            1, "prompts", initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        )
        device = next(family.denoiser.parameters()).device
        self._engine_stream = torch.cuda.default_stream(device) if device.type == "cuda" else None
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def prepare(self, request: GenerationRequest) -> Future[Any]:
        """What `Family.prepare` reads of files, then the prompts, or None for them where they had no room
        beside a pass; both stay while the result is kept. May be called from any thread.
        """
        read: Future[Any] = Future()
        files = self._family.prepare(request)
        if files is None:
            self._thread.submit(self._read, request, None, read)
        else:  # not waited for in the thread: others' prompts go first meanwhile
            files.add_done_callback(lambda files: self._read_with(request, files, read))
            read.add_done_callback(lambda read: read.cancelled() and files.cancel())
        return read

    def shutdown(self) -> None:
        """Wait for the prompt that is being read; those behind it were cancelled."""
        self._closed = True
        self._thread.shutdown(cancel_futures=True)

    def _read_with(self, request: GenerationRequest, files: Future[Any], read: Future[Any]) -> None:
        if self._closed:  # it was cancelled while its files were read
            return
        try:
            self._thread.submit(self._read, request, files, read)
        except RuntimeError as error:  # no thread can be started; a callback's error would be told to nobody
            read.set_exception(error)

    @torch.inference_mode()
    def _read(self, request: GenerationRequest, files: Future[Any] | None, read: Future[Any]) -> None:
        if not read.set_running_or_notify_cancel():
            return
        prepared = encoded = None
        try:
            if files is not None:
                prepared = files.result()  # raises what was wrong
            with quiet:
                encoded = self._encode(request)
        except torch.OutOfMemoryError:
            logger.warning("A prompt had no room beside a pass; it is read between two.")
        except Exception as error:  # the edge of this thread: the engine reports it
            read.set_exception(error)
            return
        read.set_result((prepared, encoded))

    def _encode(self, request: GenerationRequest) -> Sequence[EncodedPrompt]:
        if self._stream is None or self._engine_stream is None:
            return self._family.read_prompts(request)
        try:
            with torch.cuda.stream(self._stream):
                if request.loras:  # whose weights went to the device on the engine's stream
                    self._stream.wait_stream(self._engine_stream)
                encoded = self._family.read_prompts(request)
                for tensor in (t for p in encoded for t in (p.embeds, p.pooled) if t is not None):
                    # Else their memory could be given away while a pass that reads them is under way.
                    tensor.record_stream(self._engine_stream)
            return encoded
        finally:  # what was read before an error is in the prompt cache too
            self._stream.synchronize()
