"""The engine of pipelines that are called whole: one image at a time, in the order of arrival."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch

from hypergen.config import EngineSettings
from hypergen.engine.postprocess import Report
from hypergen.engine.request_errors import as_request_error
from hypergen.engine.request_queue import Arrival, Inbox
from hypergen.engine.warmup import warm_up_request
from hypergen.events import EngineStatus, ImageFinished, Progress, Started
from hypergen.images import encoding
from hypergen.models.diffusers_pipeline import WholePipeline
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

_MOST_MIN_STEPS = 4  # PNDM begins with so many steps of Runge and Kutta; no scheduler of diffusers wants more


class _CancelledError(Exception):
    """The request that is being drawn is wanted no more."""


class WholeEngine:
    """Draws what is submitted and reports events by request id; the counterpart of `Engine`.

    `submit`, `cancel` and `stop` may be called from any thread; `run` is the thread that owns the model, and
    reports come from it.

    Args:
        between_steps: called after every step, because a turn takes as long as a request: it hands on what is
            cancelled meanwhile.
    """

    def __init__(
        self,
        model: WholePipeline,
        model_id: str,
        settings: EngineSettings,
        report: Report,
        between_steps: Callable[[], None] = lambda: None,
    ) -> None:
        self.model = model
        self.model_id = model_id
        self.settings = settings
        self.last_step_at = time.monotonic()
        self.startup_s: dict[str, float] = {}
        self._report = report
        self._between_steps = between_steps
        self._inbox = Inbox()
        self._waiting: deque[GenerationRequest] = deque()
        self._drawing: GenerationRequest | None = None
        self._stopping = False
        self._steps = 0
        logger.warning(
            "%s is drawn whole, one image at a time: no shared steps, samplers, LoRAs, pictures or control "
            "models, and a long request holds up the next ones.",
            model.name,
        )

    def submit(self, request: GenerationRequest) -> None:
        self._inbox.submit(request)

    def cancel(self, request_id: str) -> None:
        """Take a request out at its next step; nothing more is reported of it."""
        self._inbox.cancel(request_id)

    def stop(self) -> None:
        """Let `run` return after the current request."""
        self._inbox.stop()

    def status(self) -> EngineStatus:
        return EngineStatus(
            state="ready",
            device=self.model.device.type,
            forwards=self._steps,
            image_steps=self._steps,
            startup_s=self.startup_s,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Find out the fewest steps that the pipeline can do, with an image of the default size.

        So "ready" was tried.
        """
        request = warm_up_request(self.model.describe(self.model_id))
        while True:
            try:
                fewest = replace(request, num_inference_steps=self.model.min_steps)
                pixels = self.model.draw(fewest, 0, self._stamp)
                break
            # What schedulers raise for too few steps; no other error depends on their number.
            except (ArithmeticError, LookupError, ValueError):
                if self.model.min_steps == _MOST_MIN_STEPS:
                    raise
            self.model.min_steps += 1
        encoding.encode(pixels, request, 0, self.model_id)

    @property
    def idle(self) -> bool:
        """Whether no request is here."""
        return not self._waiting and self._inbox.empty()

    @property
    def resting(self) -> bool:
        """The same: nothing else is ever to be done."""
        return self.idle

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            self.turn()

    @torch.inference_mode()
    def turn(self, wait: bool = True) -> bool:
        """Take requests in and out and draw one of them, all its images; False: nothing was to do.

        Args:
            wait: for the inbox, when idle.
        """
        self._read_inbox(wait=wait and self.idle)
        self._stamp(0)
        if not self._waiting:
            return False
        self._serve(self._waiting.popleft())
        return True

    def close(self) -> None:
        """Nothing is left open; the counterpart of `Engine.close`."""

    def _serve(self, request: GenerationRequest) -> None:
        self._drawing = request
        self._report(request.id, Started())
        try:
            tokens = self.model.count_tokens(request.prompt)
            for index in range(request.n):
                self._draw(request, index, tokens)
        except _CancelledError:
            pass
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            self._report(request.id, as_request_error(error, request))
        finally:
            self._drawing = None

    def _draw(self, request: GenerationRequest, index: int, prompt_tokens: int) -> None:
        steps = request.num_inference_steps

        def on_step(step: int) -> None:
            self._stamp(step)
            self._steps += 1
            # Pipelines with two calls a step would count beyond what was asked for.
            self._report(request.id, Progress(index * steps + min(step, steps), request.n * steps))
            self._between_steps()
            self._read_inbox(wait=False)
            if self._drawing is not request:
                raise _CancelledError

        started = time.monotonic()
        pixels = self.model.draw(request, index, on_step)
        drawn = time.monotonic()
        data = encoding.encode(pixels, request, index, self.model_id)
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

    def _stamp(self, _step: int) -> None:
        self.last_step_at = time.monotonic()

    def _read_inbox(self, wait: bool) -> None:
        for message in self._inbox.read(idle=wait, busy=not wait):
            if message is None:
                self._stopping = True
            elif isinstance(message, Arrival):
                self._waiting.append(message.request)
            else:
                self._waiting = deque(r for r in self._waiting if r.id != message)
                if self._drawing is not None and self._drawing.id == message:
                    self._drawing = None
