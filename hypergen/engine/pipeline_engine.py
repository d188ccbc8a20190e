"""The engine of full diffusers pipelines: one image at a time, in order of arrival."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import torch

from hypergen.config import EngineSettings
from hypergen.engine.image_writer import ImageWriter
from hypergen.engine.postprocess import Report
from hypergen.engine.request_errors import as_request_error
from hypergen.engine.warmup import warm_up_request
from hypergen.errors import ContentPolicyError
from hypergen.events import EngineStatus, ForwardPass, ImageFinished, Progress, Started
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

# PNDM needs this many for its Runge-Kutta steps; no scheduler of diffusers needs more.
_MAX_MIN_STEPS = 4


class _CancelledError(Exception):
    """The request that is running was cancelled."""


class PipelineEngine:
    """Generates the images of added requests and reports their events by request id, like `Engine`.

    All methods but `status` belong to the thread that owns the model. Events are reported from that thread.

    Args:
        between_steps: called after every denoising step. It reads the request queue and may call `cancel`,
            because one call of `step` runs a whole request.
        on_forward: called after every denoising step.
    """

    def __init__(
        self,
        model: DiffusersPipeline,
        model_id: str,
        settings: EngineSettings,
        report: Report,
        between_steps: Callable[[], None] = lambda: None,
        on_forward: Callable[[ForwardPass], None] = lambda _: None,
    ) -> None:
        self.model = model
        self._device = model.device  # where it runs, also while its weights are elsewhere
        self.model_id = model_id
        self.settings = settings
        self.last_step_at = time.monotonic()
        self._writer = ImageWriter(model_id, settings)
        self._report = report
        self._between_steps = between_steps
        self._on_forward = on_forward
        self._waiting: deque[GenerationRequest] = deque()
        self._running: GenerationRequest | None = None
        self._steps = 0
        logger.warning(
            "%s runs as a full diffusers pipeline, one image at a time: without step-level batching, "
            "samplers, LoRAs, input images and ControlNets. A long request delays the next ones.",
            model.name,
        )

    def add_request(self, request: GenerationRequest) -> None:
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Remove a request, or stop it at its next step, and report no more events of it."""
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        if self._running is not None and self._running.id == request_id:
            self._running = None

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting)

    def status(self) -> EngineStatus:
        return EngineStatus(
            state="ready",
            device=self._device.type,
            forwards=self._steps,
            image_steps=self._steps,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Generate an image of the default size, so that "ready" is tested, and find the pipeline's
        `min_steps`.
        """
        request = warm_up_request(self.model.model_info(self.model_id))
        while True:
            try:
                trial = replace(request, num_inference_steps=self.model.min_steps)
                pixels = self.model.generate(trial, 0, self._heartbeat)
                break
            # The errors of noise schedulers for too few steps; no other error depends on the number of steps.
            except (ArithmeticError, LookupError, ValueError):
                if self.model.min_steps == _MAX_MIN_STEPS:
                    raise
            self.model.min_steps += 1
        with suppress(ContentPolicyError):
            self._writer.write(pixels, request, 0)

    @torch.inference_mode()
    def step(self) -> float:
        """Generate all images of one request; see `Engine.step`."""
        self._heartbeat(0)
        if not self._waiting:
            return math.inf
        self._run_request(self._waiting.popleft())
        return 0.0

    def free_memory(self) -> None:
        """Does nothing: a pipeline keeps only its weights."""

    def close(self) -> None:
        """Does nothing; for the same interface as `Engine`."""

    def _run_request(self, request: GenerationRequest) -> None:
        self._running = request
        self._report(request.id, Started())
        try:
            tokens = self.model.count_tokens(request.prompt)
            for index in range(request.n):
                self._generate(request, index, tokens)
        except _CancelledError:
            pass
        except Exception as error:  # Isolate the failure: only this request fails.
            self._report(request.id, as_request_error(error, request))
        finally:
            self._running = None

    def _generate(self, request: GenerationRequest, index: int, prompt_tokens: int) -> None:
        steps = request.num_inference_steps

        def on_step(step: int) -> None:
            nonlocal step_started
            self._heartbeat(step)
            self._steps += 1
            self._on_forward(ForwardPass(self.model_id, 1, rows, self.last_step_at - step_started))
            step_started = self.last_step_at
            # A pipeline with two forward passes per step would report more steps than requested.
            self._report(request.id, Progress(index * steps + min(step, steps), request.n * steps))
            self._between_steps()
            if self._running is not request:
                raise _CancelledError

        rows = 2 if request.guidance_scale > 1 else 1
        started = step_started = time.monotonic()
        pixels = self.model.generate(request, index, on_step)
        generated_at = time.monotonic()
        data = self._writer.write(pixels, request, index)
        self._report(
            request.id,
            ImageFinished(
                index=index,
                seed=request.seed + index,
                data=data,
                prompt_tokens=prompt_tokens,
                shared_forwards=0,
                images_per_forward=1,
                engine_s=generated_at - started,
                decode_s=generated_at - step_started,
                encode_s=time.monotonic() - generated_at,
            ),
        )

    def _heartbeat(self, _step: int) -> None:
        self.last_step_at = time.monotonic()
