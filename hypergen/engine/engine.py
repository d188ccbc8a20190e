"""The engine: admits requests, advances images step by step, finishes them. One thread owns it and the
device.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.engine.batching import CostCurve, GroupKey, group_key, next_batch
from hypergen.engine.determinism import DeterminismRule, Probe
from hypergen.errors import GenerationError, OutOfMemoryError, RequestError
from hypergen.generation import (
    EngineStatus,
    Event,
    GenerationRequest,
    ImageFinished,
    Progress,
    Started,
    Verdict,
)
from hypergen.images import codec
from hypergen.models.family import Family
from hypergen.trajectory import Trajectory

logger = logging.getLogger(__name__)

Report = Callable[[str, Event | RequestError], None]


@dataclass
class _Running:
    """A request from its admission to its last picture."""

    request: GenerationRequest
    images_left: int
    steps_done: int = 0
    steps_due: int = 0
    started: bool = False
    trajectories: list[Trajectory] = field(default_factory=list)


class Engine:
    """Draws what is submitted and reports events by request id.

    `submit`, `cancel` and `stop` may be called from any thread; `run` is the thread that owns the model.
    Reports come from that thread and, for finished pictures, from the threads that encode files.
    """

    _ENCODERS = 2
    _IDLE_WAIT_S = 1.0

    def __init__(self, family: Family, model_id: str, settings: EngineSettings, report: Report) -> None:
        self.family = family
        self.model_id = model_id
        self.settings = settings
        self.last_step_at = time.monotonic()
        self._report = report
        self._inbox: queue.SimpleQueue[GenerationRequest | str | None] = queue.SimpleQueue()
        self._arrived: deque[GenerationRequest] = deque()
        self._running: dict[str, _Running] = {}
        self._active: list[Trajectory] = []
        self._denoised: deque[Trajectory] = deque()
        self._stopping = False
        self._encoders = ThreadPoolExecutor(self._ENCODERS, thread_name_prefix="encode")
        self._rule = DeterminismRule(
            family, enabled=settings.determinism == "strict", max_rows=2 * settings.max_batch_size
        )
        self._probes: dict[tuple[int, int], Probe] = {}
        self._costs: dict[GroupKey, CostCurve] = {}
        self._forwards = 0
        self._image_steps = 0

    def submit(self, request: GenerationRequest) -> None:
        self._inbox.put(request)

    def cancel(self, request_id: str) -> None:
        """Take a request out before its next step; nothing more is reported of it."""
        self._inbox.put(request_id)

    def stop(self) -> None:
        """Let `run` return after the current step."""
        self._inbox.put(None)

    def status(self) -> EngineStatus:
        verdicts: dict[str, Verdict] = {
            f"{w}x{h}": probe.verdict for (w, h), probe in list(self._probes.items())
        }
        return EngineStatus(
            state="ready",
            device=self.family.describe(self.model_id).device,
            determinism=verdicts,
            forwards=self._forwards,
            image_steps=self._image_steps,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Probe the default size and draw one small-step picture of it, so that "ready" is a promise that was
        tried.

        Raises:
            GenerationError: the model does not draw.
        """
        defaults = self.family.describe(self.model_id).defaults
        request = GenerationRequest(
            id="warm-up",
            prompt="",
            negative_prompt=None,
            width=defaults.width,
            height=defaults.height,
            num_inference_steps=2,
            guidance_scale=defaults.guidance_scale,
            seed=0,
            seed_given=False,
        )
        self._probe(request)
        trajectory = self.family.start(request, 0)
        while trajectory.remaining_steps:
            trajectory.advance(self.family.denoise([trajectory])[0])
        codec.encode(self._decode(trajectory), request, 0, self.model_id)

    @torch.inference_mode()
    def run(self) -> None:
        """Serve until `stop`: between two steps, take new requests in, cancelled ones out, and finish one
        image.
        """
        while not self._stopping:
            self._read_inbox(wait=not (self._arrived or self._active or self._denoised))
            self.last_step_at = time.monotonic()
            # One encoding and one decoding at most between two steps, so that running images do not stall.
            if self._arrived:
                self._admit(self._arrived.popleft())
            self.step()
            if self._denoised:
                self._finish(self._denoised.popleft())
        self._encoders.shutdown()

    def step(self) -> None:
        """Advance one batch of images by one denoising step."""
        now = time.monotonic()
        batch = next_batch(self._active, self._costs, self.settings.max_batch_size, self.settings.aging, now)
        if not batch:
            return
        for trajectory, noise_pred in self._denoise(batch):
            self._advance(trajectory, noise_pred)
        for request_id in {trajectory.request.id for trajectory in batch} & self._running.keys():
            running = self._running[request_id]
            self._report(request_id, Progress(running.steps_done, running.steps_due))

    def _read_inbox(self, wait: bool) -> None:
        try:
            message = self._inbox.get(timeout=self._IDLE_WAIT_S) if wait else self._inbox.get_nowait()
            while True:
                if message is None:
                    self._stopping = True
                elif isinstance(message, GenerationRequest):
                    self._arrived.append(message)
                else:
                    self._drop(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            pass

    def _admit(self, request: GenerationRequest) -> None:
        """Turn a request into its trajectories and let them join."""
        try:
            probe = self._probe(request)
            trajectories = [self.family.start(request, index) for index in range(request.n)]
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            self._fail(request.id, _as_request_error(error, request))
            return
        lone = self.settings.determinism == "strict" and request.seed_given and probe.verdict == "close"
        for trajectory in trajectories:
            trajectory.lone = lone
            key = group_key(trajectory)
            if key not in self._costs:
                self._costs[key] = self._cost_curve(probe)
        steps_due = sum(trajectory.remaining_steps for trajectory in trajectories)
        self._running[request.id] = _Running(
            request, request.n, steps_due=steps_due, trajectories=trajectories
        )
        self._active.extend(trajectories)

    def _probe(self, request: GenerationRequest) -> Probe:
        size = self.family.drawn_size(request.width, request.height)
        if size not in self._probes:
            self._probes[size] = self._rule.probe(*size)
            logger.info("Probed %dx%d: %s", *size, self._probes[size])
        return self._probes[size]

    def _cost_curve(self, probe: Probe) -> CostCurve:
        if self.settings.determinism == "fast":
            return CostCurve(2 * self.settings.max_batch_size, None, dict(probe.seconds))
        return CostCurve(max(probe.seconds), frozenset(probe.seconds), dict(probe.seconds))

    def _denoise(self, batch: list[Trajectory]) -> list[tuple[Trajectory, Tensor]]:
        """One forward pass; when it fails, one pass for each image, so that only the guilty request fails."""
        key = group_key(batch[0])
        rows = sum(trajectory.rows for trajectory in batch)
        started = time.monotonic()
        try:
            predictions = self.family.denoise(batch)
        except Exception as error:  # the same edge
            if len(batch) == 1:
                self._fail(batch[0].request.id, _as_request_error(error, batch[0].request))
                return []
            logger.warning("A pass over %d rows failed (%s); each image runs alone now.", rows, error)
            if isinstance(error, torch.OutOfMemoryError):
                self._costs[key].max_rows = max(2, rows // 2)
                torch.cuda.empty_cache()
            return [pair for trajectory in batch for pair in self._denoise([trajectory])]
        _wait_for(predictions[0])
        self._costs[key].record(rows, time.monotonic() - started)
        self._forwards += 1
        self._image_steps += len(batch)
        shared = len({trajectory.request.id for trajectory in batch}) > 1
        for trajectory in batch:
            trajectory.shared_forwards += shared
        return list(zip(batch, predictions, strict=True))

    def _advance(self, trajectory: Trajectory, noise_pred: Tensor) -> None:
        running = self._running.get(trajectory.request.id)
        if running is None:  # another image of the request failed in this very step
            return
        try:
            trajectory.advance(noise_pred)
        except Exception as error:  # the same edge
            self._fail(trajectory.request.id, _as_request_error(error, trajectory.request))
            return
        running.steps_done += 1
        if not running.started:
            running.started = True
            self._report(trajectory.request.id, Started())
        if not trajectory.remaining_steps:
            self._active.remove(trajectory)
            self._denoised.append(trajectory)

    def _finish(self, trajectory: Trajectory) -> None:
        """Decode one image here and hand its pixels to the encoding threads."""
        request = trajectory.request
        try:
            pixels = self._decode(trajectory)
        except Exception as error:  # the same edge
            self._fail(request.id, _as_request_error(error, request))
            return
        running = self._running[request.id]
        running.images_left -= 1
        if running.images_left == 0:
            self._forget(request.id)
        self._encoders.submit(self._encode, trajectory, pixels)

    def _decode(self, trajectory: Trajectory) -> np.ndarray:
        if not torch.isfinite(trajectory.latents).all():
            sampler = trajectory.request.sampler or "of the model"
            raise GenerationError(
                f"The sampler {sampler} left the numbers it can draw with; try other settings."
            )
        return self.family.decode(trajectory)

    def _encode(self, trajectory: Trajectory, pixels: np.ndarray) -> None:
        request = trajectory.request
        try:
            data = codec.encode(pixels, request, trajectory.index, self.model_id)
        except Exception as error:  # the same edge, on the encoders' side
            self._report(request.id, _as_request_error(error, request))
            return
        self._report(
            request.id,
            ImageFinished(
                index=trajectory.index,
                seed=trajectory.seed,
                data=data,
                prompt_tokens=trajectory.prompt_tokens,
                shared_forwards=trajectory.shared_forwards,
            ),
        )

    def _fail(self, request_id: str, error: RequestError) -> None:
        self._drop(request_id)
        self._report(request_id, error)

    def _drop(self, request_id: str) -> None:
        self._arrived = deque(request for request in self._arrived if request.id != request_id)
        self._active = [trajectory for trajectory in self._active if trajectory.request.id != request_id]
        self._denoised = deque(
            trajectory for trajectory in self._denoised if trajectory.request.id != request_id
        )
        self._forget(request_id)

    def _forget(self, request_id: str) -> None:
        running = self._running.pop(request_id, None)
        for trajectory in running.trajectories if running else ():
            if trajectory.lone:  # its group was its own
                self._costs.pop(group_key(trajectory), None)


def _as_request_error(error: Exception, request: GenerationRequest) -> RequestError:
    if isinstance(error, RequestError):
        return error
    logger.exception("Request %s failed.", request.id, exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        size = f"{request.width}x{request.height}"
        return OutOfMemoryError(
            f"CUDA out of memory while drawing {size}, even alone; ask for a smaller size."
        )
    return GenerationError("The picture could not be drawn; the server's log says why.")


def _wait_for(output: Tensor) -> None:
    """Until the device is done, else the cost curve would learn how fast kernels are queued."""
    if output.device.type == "cuda":
        torch.cuda.synchronize()
