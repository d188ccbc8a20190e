"""The engine of pipelines that are called whole: one image at a time, in the order of arrival."""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from hypergen.config import EngineSettings
from hypergen.engine.postprocess import Report
from hypergen.engine.request_errors import as_request_error
from hypergen.engine.warmup import warm_up_request
from hypergen.events import EngineStatus, ImageFinished, Progress, Started
from hypergen.images import encoding
from hypergen.models.diffusers_pipeline import DiffusersPipeline
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

_MOST_MIN_STEPS = 4  # PNDM begins with so many steps of Runge and Kutta; no scheduler of diffusers wants more


class _CancelledError(Exception):
    """The request that is running was cancelled."""


class PipelineEngine:
    """Generates the images of the requests that are added, and reports events by request id; the counterpart
    of `Engine`. All methods but `status` belong to the thread that owns the model; reports come from it.

    Args:
        between_steps: called after every denoising step, because `step` takes as long as a request: it
            cancels what clients no longer want.
    """

    def __init__(
        self,
        model: DiffusersPipeline,
        model_id: str,
        settings: EngineSettings,
        report: Report,
        between_steps: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.model_id = model_id
        self.settings = settings
        self.last_step_at = time.monotonic()
        self._report = report
        self._between_steps = between_steps
        self._waiting: deque[GenerationRequest] = deque()
        self._running: GenerationRequest | None = None
        self._steps = 0
        logger.warning(
            "%s is drawn whole, one image at a time: no shared steps, samplers, LoRAs, pictures or control "
            "models, and a long request holds up the next ones.",
            model.name,
        )

    def add_request(self, request: GenerationRequest) -> None:
        self._waiting.append(request)

    def cancel(self, request_id: str) -> None:
        """Take a request out, or end it at its next step; nothing more is reported of it."""
        self._waiting = deque(request for request in self._waiting if request.id != request_id)
        if self._running is not None and self._running.id == request_id:
            self._running = None

    @property
    def has_requests(self) -> bool:
        return bool(self._waiting)

    def status(self) -> EngineStatus:
        return EngineStatus(
            state="ready",
            device=self.model.device.type,
            forwards=self._steps,
            image_steps=self._steps,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Find out the fewest steps that the pipeline can do, with an image of the default size.

        So "ready" was tried.
        """
        request = warm_up_request(self.model.model_info(self.model_id))
        while True:
            try:
                fewest = replace(request, num_inference_steps=self.model.min_steps)
                pixels = self.model.generate(fewest, 0, self._heartbeat)
                break
            # What schedulers raise for too few steps; no other error depends on their number.
            except (ArithmeticError, LookupError, ValueError):
                if self.model.min_steps == _MOST_MIN_STEPS:
                    raise
            self.model.min_steps += 1
        encoding.encode_image(pixels, request, 0, self.model_id)

    @torch.inference_mode()
    def step(self) -> float:
        """Generate all images of one request; see `Engine.step`."""
        self._heartbeat(0)
        if not self._waiting:
            return math.inf
        self._serve(self._waiting.popleft())
        return 0.0

    def close(self) -> None:
        """Nothing is left open; the counterpart of `Engine.close`."""

    def _serve(self, request: GenerationRequest) -> None:
        self._running = request
        self._report(request.id, Started())
        try:
            tokens = self.model.count_tokens(request.prompt)
            for index in range(request.n):
                self._generate(request, index, tokens)
        except _CancelledError:
            pass
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            self._report(request.id, as_request_error(error, request))
        finally:
            self._running = None

    def _generate(self, request: GenerationRequest, index: int, prompt_tokens: int) -> None:
        steps = request.num_inference_steps

        def on_step(step: int) -> None:
            self._heartbeat(step)
            self._steps += 1
            # Pipelines with two calls a step would count beyond what was asked for.
            self._report(request.id, Progress(index * steps + min(step, steps), request.n * steps))
            self._between_steps()
            if self._running is not request:
                raise _CancelledError

        started = time.monotonic()
        pixels = self.model.generate(request, index, on_step)
        drawn = time.monotonic()
        data = encoding.encode_image(pixels, request, index, self.model_id)
        self._report(
            request.id,
            ImageFinished(
                index=index,
                seed=request.seed + index,
                data=data,
                prompt_tokens=prompt_tokens,
                shared_forwards=0,
                engine_s=drawn - started,
                encode_s=time.monotonic() - drawn,
            ),
        )

    def _heartbeat(self, _step: int) -> None:
        self.last_step_at = time.monotonic()
