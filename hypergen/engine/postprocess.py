"""Decodes final latents and encodes the image files, without delaying the next denoising step."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from hypergen import log_setup
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.cuda_graphs import CudaGraphs, Inputs
from hypergen.engine.host_copy import HostCopy
from hypergen.engine.image_writer import ImageWriter
from hypergen.engine.request_errors import as_request_error, free_cached_memory, is_out_of_memory
from hypergen.errors import GenerationError, RequestError
from hypergen.events import Event, ImageFinished
from hypergen.models.family import Family
from hypergen.models.memory import memory_left_free, vae_tiling

logger = logging.getLogger(__name__)

Report = Callable[[str, Event | RequestError], None]


class PostProcessor:
    """Decodes in the engine's thread, one image per call, and encodes files in other threads.

    Args:
        on_failure: called from any thread with the id of a failed request, whose other images then stop, or
            with the error of a lost device.
        own_stream: decode in parallel with the next step instead of before it; needs CUDA.
        graphs: decode as CUDA graphs, with their own memory pool, because they run in parallel with those of
            forward passes; needs `own_stream`.
        tile_if_needed: decode in tiles where the device has too little memory for an image at once.
        free_memory: called when the device is out of memory, before another try.
        encoders: executor that encodes files; None: two threads.
    """

    _ENCODER_THREADS = 2

    def __init__(
        self,
        family: Family,
        writer: ImageWriter,
        report: Report,
        on_failure: Callable[[str | Exception], None],
        *,
        clock: Callable[[], float],
        own_stream: bool,
        graphs: bool = False,
        tile_if_needed: bool = False,
        free_memory: Callable[[], None] = free_cached_memory,
        encoders: Executor | None,
    ) -> None:
        self._family = family
        self._writer = writer
        self._report = report
        self._on_failure = on_failure
        self._clock = clock
        self._stream = torch.cuda.Stream() if own_stream else None
        self.graphs: CudaGraphs[tuple[Tensor, Tensor]] | None = CudaGraphs("Decoding") if graphs else None
        self._free_memory = free_memory
        self._tile_if_needed = tile_if_needed and hasattr(family.vae, "tile_latent_min_size")
        # By the shape of the latents: True where it was decoded at once, which then must not change.
        self._fits: dict[torch.Size, bool] = {}
        self._bytes_per_latent = 0.0  # of decoding at once, for each number of the latents
        self.encoders = encoders or ThreadPoolExecutor(
            self._ENCODER_THREADS, "encode", log_setup.current_model.set, (log_setup.current_model.get(),)
        )

    def decode(self, state: DenoisingState) -> HostCopy:
        """Start to decode an image. Without denoising, the result is the input image itself.

        Returns:
            Pixels, uint8, shape (H, W, 3); whether latents and decoded image are free of NaN and Inf, bool,
            shape (2,).
        """
        input_image = state.request.image
        if state.skip_denoising and input_image is not None:
            pixels = torch.frombuffer(bytearray(input_image.pixels), dtype=torch.uint8)
            pixels = pixels.reshape(input_image.height, input_image.width, 3)
            return HostCopy(pixels, torch.tensor([True, True]))
        if self._stream is None:
            return self._decode(state)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            state.latents.record_stream(self._stream)
            return self._decode(state)

    @contextmanager
    def leave_room(self, latents: Tensor) -> Iterator[None]:
        """Let a forward pass fail rather than take the memory that decoding one of its images needs.

        Args:
            latents: of one image or more, shape (N, ...).
        """
        captured = [] if self.graphs is None else self.graphs.captured("latents")
        # Graphs have their memory already, and share it.
        missing = latents[0].numel() - max((tensor.numel() for tensor in captured), default=0)
        if self._stream is None or missing <= 0 or not self._bytes_per_latent:
            yield
            return
        with memory_left_free(missing * self._bytes_per_latent):
            yield

    def submit_encode(self, state: DenoisingState, decoded: HostCopy) -> None:
        """Encode the file in an encoder thread, which then reports the image."""
        engine_s = self._clock() - state.queued_at
        self.encoders.submit(self._encode, state, decoded, engine_s).add_done_callback(self._check_encoding)

    def encode(self, state: DenoisingState, decoded: HostCopy) -> bytes:
        """Wait for the pixels and encode the image file.

        Raises:
            ContentPolicyError: the content filter refused the image.
            GenerationError: the sampler or the VAE produced NaN or Inf values.
        """
        pixels, finite = decoded.wait()
        latents_finite, image_finite = finite.tolist()
        if not latents_finite:
            name = state.request.sampler
            sampler = f"Sampler '{name}'" if name else "The model's default sampler"
            raise GenerationError(
                f"{sampler} produced NaN or Inf latents with these settings; "
                "try more steps or another sampler."
            )
        if not image_finite:
            raise GenerationError("The VAE produced NaN or Inf values; serve the model with --dtype float32.")
        return self._writer.write(pixels.numpy(), state.request, state.index)

    def shutdown(self) -> None:
        self.encoders.shutdown()

    def _decode(self, state: DenoisingState) -> HostCopy:
        """Decode at once, or in tiles at sizes that never fitted: tiles change pixels."""
        shape = state.latents.shape
        if self._fits.get(shape, True):
            may_tile = self._tile_if_needed and shape not in self._fits
            for is_last_try in (False, True):
                try:
                    decoded = self._decode_at_once(state)
                except RuntimeError as error:
                    if not is_out_of_memory(error) or (is_last_try and not may_tile):
                        raise
                else:
                    self._fits[shape] = True
                    return decoded
                # Outside the handler: inside, the error's frames would keep the memory of the failed attempt.
                self._free_memory()
            logger.warning("No memory to decode an image of latents %s at once; using tiles.", tuple(shape))
            self._fits[shape] = False
        with vae_tiling(self._family.vae):
            return HostCopy(*self._pixels(state, {"latents": state.latents}))

    def _decode_at_once(self, state: DenoisingState) -> HostCopy:
        inputs = {"latents": state.latents}
        run = partial(self._pixels, state)
        if self._stream is not None and state.latents.shape not in self._fits:
            run = partial(self._measured, run)
        if self.graphs is None:
            return HostCopy(*run(inputs))
        # The next run of the graph waits for the copy, on the same stream.
        return HostCopy(*self.graphs.run((), inputs, run))

    def _measured(
        self, run: Callable[[Inputs], tuple[Tensor, Tensor]], inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Run, and measure the memory that this takes."""
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        output = run(inputs)
        used = torch.cuda.max_memory_allocated() - before
        self._bytes_per_latent = max(self._bytes_per_latent, used / inputs["latents"].numel())
        return output

    def _pixels(self, state: DenoisingState, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The pixels, and whether latents and image are finite, on the device."""
        latents = inputs["latents"]
        image = self._family.decode(replace(state, latents=latents))
        return to_pixels(image), torch.stack([torch.isfinite(tensor).all() for tensor in (latents, image)])

    def _encode(self, state: DenoisingState, decoded: HostCopy, engine_s: float) -> None:
        request = state.request
        try:
            decoded.wait()
            decoded_at = time.monotonic()
            data = self.encode(state, decoded)
        except Exception as error:  # Isolate the failure: only this request fails.
            self._on_failure(request.id)
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
                images_per_forward=state.batch_images / max(1, state.forwards),
                engine_s=engine_s,
                decode_s=decoded_at - state.denoised_at,
                encode_s=time.monotonic() - decoded_at,
            ),
        )

    def _check_encoding(self, encoding: Future[None]) -> None:
        error = encoding.exception()
        if isinstance(error, torch.AcceleratorError):  # an idle engine would not notice it
            self._on_failure(error)
        elif error is not None:
            logger.error("An image or its error could not be reported.", exc_info=error)


def to_pixels(image: Tensor) -> Tensor:
    """Convert a decoded image in -1..1, shape (1, 3, H, W), to uint8, shape (H, W, 3)."""
    return ((image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float() * 255)[0].round().to(torch.uint8)
