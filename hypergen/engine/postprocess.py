"""Finishing: from denoised latents to the bytes of a file, off the path of the next step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.request_errors import as_request_error
from hypergen.errors import GenerationError, RequestError
from hypergen.events import Event, ImageFinished
from hypergen.images import encoding
from hypergen.models.family import Family

logger = logging.getLogger(__name__)

Report = Callable[[str, Event | RequestError], None]


@dataclass(frozen=True)
class DecodedImage:
    """Pixels on their way from the device.

    Attributes:
        pixels: uint8, shape (H, W, 3), on the CPU as soon as `done` has happened.
        finite: whether the decoder gave numbers; one bool, as a tensor.
        done: None when nothing is under way.
    """

    pixels: Tensor
    finite: Tensor
    done: torch.cuda.Event | None


class PostProcessor:
    """Decodes on the engine's thread, one image per call, and encodes in threads of its own.

    Args:
        fail: told from any thread the id of a request whose other images are to stop, or that the device is
            lost.
        own_stream: decode beside the next step instead of before it; needs CUDA.
        encoders: where pixels become files; absent: two threads.
    """

    _ENCODERS = 2

    def __init__(
        self,
        family: Family,
        model_id: str,
        report: Report,
        fail: Callable[[str | Exception], None],
        *,
        clock: Callable[[], float],
        own_stream: bool,
        encoders: Executor | None,
    ) -> None:
        self._family = family
        self._model_id = model_id
        self._report = report
        self._fail = fail
        self._clock = clock
        self._stream = torch.cuda.Stream() if own_stream else None
        self.encoders = encoders or ThreadPoolExecutor(self._ENCODERS, thread_name_prefix="encode")

    def decode(self, state: DenoisingState) -> DecodedImage:
        """Start to turn latents into pixels; an image of which nothing is drawn is the picture that was sent.

        Raises:
            GenerationError: the latents are no numbers.
        """
        picture = state.request.image
        if state.skip_denoising and picture is not None:
            pixels = torch.frombuffer(bytearray(picture.pixels), dtype=torch.uint8)
            return DecodedImage(pixels.reshape(picture.height, picture.width, 3), torch.tensor(True), None)
        if not torch.isfinite(state.latents).all():
            sampler = state.request.sampler or "of the model"
            raise GenerationError(
                f"The sampler {sampler} left the numbers it can draw with; try other settings."
            )
        if self._stream is None:
            return DecodedImage(*self._pixels(state), None)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            state.latents.record_stream(self._stream)
            pixels, finite = self._pixels(state)
            done = torch.cuda.Event()
            done.record(self._stream)
            return DecodedImage(pixels, finite, done)

    def submit_encode(self, state: DenoisingState, decoded: DecodedImage) -> None:
        """Hand pixels to the threads that write files; they report the picture."""
        engine_s = self._clock() - state.queued_at
        self.encoders.submit(self._encode, state, decoded, engine_s).add_done_callback(self._encoded)

    def encode(self, state: DenoisingState, decoded: DecodedImage) -> bytes:
        """The file of an image, as soon as its pixels are there.

        Raises:
            GenerationError: the decoder gave no numbers.
        """
        if decoded.done is not None:
            decoded.done.synchronize()
        if not decoded.finite:
            raise GenerationError("The decoder of this model left the numbers it can draw with.")
        return encoding.encode_image(decoded.pixels.numpy(), state.request, state.index, self._model_id)

    def shutdown(self) -> None:
        self.encoders.shutdown()

    def _pixels(self, state: DenoisingState) -> tuple[Tensor, Tensor]:
        image = self._family.decode(state)
        finite = torch.isfinite(image).all()
        return to_pixels(image).to("cpu", non_blocking=True), finite.to("cpu", non_blocking=True)

    def _encode(self, state: DenoisingState, decoded: DecodedImage, engine_s: float) -> None:
        request = state.request
        started = time.monotonic()
        try:
            data = self.encode(state, decoded)
        except Exception as error:  # the edge where one picture's trouble must not become everyone's
            self._fail(request.id)
            self._report(request.id, as_request_error(error, request))
            return
        self._report(
            request.id,
            ImageFinished(
                index=state.index,
                seed=state.seed,
                data=data,
                prompt_tokens=state.prompt_tokens,
                shared_forwards=state.shared_forwards,
                engine_s=engine_s,
                encode_s=time.monotonic() - started,
            ),
        )

    def _encoded(self, encoding: Future[None]) -> None:
        error = encoding.exception()
        if isinstance(error, torch.AcceleratorError):  # the engine may be idle, and would not notice
            self._fail(error)
        elif error is not None:
            logger.error("An image could not be reported.", exc_info=error)


def to_pixels(image: Tensor) -> Tensor:
    """From a decoder's -1..1, shape (1, 3, H, W), to uint8, shape (H, W, 3)."""
    return ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float() * 255)[0].round().to(torch.uint8)
