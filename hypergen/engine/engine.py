"""The engine: admits requests, advances images step by step, finishes them. One thread owns it and the
device.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Generator
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import Trajectory
from hypergen.engine.batch_invariance.shape_profiles import Shapes
from hypergen.engine.batched_euler import advance_all
from hypergen.engine.optimizations import accelerate
from hypergen.engine.passes import Passes
from hypergen.engine.postprocess import Finisher, Report
from hypergen.engine.previews import Previewer
from hypergen.engine.request_errors import as_request_error
from hypergen.engine.request_queue import Arrival, Inbox
from hypergen.engine.scheduler import group_key, next_batch
from hypergen.engine.warmup import draw_once
from hypergen.errors import RequestError
from hypergen.events import EngineStatus, Progress, Started
from hypergen.models.family import Family
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)


@dataclass
class _Running:
    """A request from its admission to its last picture."""

    request: GenerationRequest
    images_left: int
    steps_done: int = 0
    steps_due: int = 0
    started: bool = False


class Engine:
    """Draws what is submitted and reports events by request id.

    `submit`, `cancel` and `stop` may be called from any thread; `run` is the thread that owns the model.
    Reports come from that thread and, for finished pictures, from the threads that encode files.

    Args:
        clock: seconds by which passes are measured and waiting counts; a benchmark gives CPU time.
        encoders: where finished pictures become files; absent: threads of its own.
    """

    _SHORTEST_MOMENT_S = 0.02

    def __init__(
        self,
        family: Family,
        model_id: str,
        settings: EngineSettings,
        report: Report,
        *,
        clock: Callable[[], float] = time.monotonic,
        encoders: Executor | None = None,
    ) -> None:
        accelerate(family, settings)
        self.family = family
        self.model_id = model_id
        self.settings = settings
        self.last_step_at = clock()
        self.startup_s: dict[str, float] = {}
        self._clock = clock
        self._report = report
        self._inbox = Inbox(family.load_loras, clock)
        self._joining: deque[tuple[GenerationRequest, Generator[None]]] = deque()
        self._running: dict[str, _Running] = {}
        self._active: list[Trajectory] = []
        self._denoised: deque[Trajectory] = deque()
        self._stopping = False
        self._finisher = Finisher(
            family,
            model_id,
            report,
            self.cancel,
            self._inbox.fail,
            clock=clock,
            own_stream=settings.decode_stream,
            encoders=encoders,
        )
        self._previewer = Previewer(family, report, self._finisher.encoders)
        self.shapes = Shapes(family, settings, clock)
        self._passes = Passes(family, self.shapes, clock)

    def submit(self, request: GenerationRequest) -> None:
        self._inbox.submit(request)

    def cancel(self, request_id: str) -> None:
        """Take a request out before its next step; nothing more is reported of it."""
        self._inbox.cancel(request_id)

    def stop(self) -> None:
        """Let `run` return after the current step."""
        self._inbox.stop()

    def status(self) -> EngineStatus:
        return EngineStatus(
            state="ready",
            device=self.family.device.type,
            determinism=self.shapes.verdicts(),
            forwards=self._passes.count,
            image_steps=self._passes.image_steps,
            startup_s=self.startup_s,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Probe the default size and draw a picture of it in two steps, so that "ready" was tried.

        Raises:
            GenerationError: the model does not draw.
        """
        trajectory = draw_once(self.family, self.family.describe(self.model_id), self.shapes)
        self._finisher.encode(trajectory, self._finisher.decode(trajectory))

    def run(self) -> None:
        """Serve until `stop`."""
        while not self._stopping:
            self.turn()
        self.close()

    def close(self) -> None:
        """Wait for the files that are being written; no turn may follow."""
        self._finisher.shutdown()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to do."""
        return self.resting and not self.shapes.unfinished(())

    @property
    def resting(self) -> bool:
        """Whether no request is here; a probe of larger passes may still be under way."""
        return not self._busy and self._inbox.empty()

    @property
    def _busy(self) -> bool:
        return bool(self._joining or self._active or self._denoised)

    @torch.inference_mode()
    def turn(self, wait: bool = True) -> bool:
        """Take requests in and out, advance one batch by one step, finish images; False: nothing was to do.

        Args:
            wait: for the inbox, while nothing else is to do.
        """
        self._read_inbox(wait)
        self.last_step_at = self._clock()
        moved = self._busy
        self._in_a_moment(lambda: self._joining, self._admit)
        self.step()
        self._in_a_moment(lambda: self._denoised, self._finish)
        # A request whose prompts are being read would wait for the end of an idle pass.
        may_probe = not self._joining and bool(self._active or self._inbox.empty())
        if may_probe and (shape := self.shapes.unfinished(self._active)):
            self._stamp()
            self.shapes.probe_on(shape)
            moved = True
        return moved

    def _stamp(self) -> None:
        """Say that the engine moves; a new size of a compiled model may then take minutes and is no stall."""
        self.last_step_at = math.inf if self.settings.compile != "off" else self._clock()

    def _in_a_moment(self, line: Callable[[], Collection[object]], serve_next: Callable[[], None]) -> None:
        """Serve a line between two steps for about as long as a forward pass takes, so that running images do
        not stall, however much there is to encode, probe or decode.
        """
        until = self._clock() + max(self._passes.seconds, self._SHORTEST_MOMENT_S)
        while line():
            self._stamp()
            serve_next()
            if self._clock() > until:
                return

    def step(self) -> None:
        """Advance one batch of images by one denoising step."""
        now = self._clock()
        batch = next_batch(
            self._active, self.shapes.costs, self.settings.max_batch_size, self.settings.aging, now
        )
        if not batch:
            return
        self.last_step_at = now
        for request_id in {trajectory.request.id for trajectory in batch}:
            if not self._running[request_id].started:
                self._running[request_id].started = True
                self._report(request_id, Started())
        # Another image of a request may have failed in this very batch.
        pairs = [pair for pair in self._denoise(batch) if pair[0].request.id in self._running]
        for trajectory, prediction in pairs:
            running = self._running[trajectory.request.id]
            self._previewer.look_at(trajectory, prediction, running.steps_due // running.request.n)
        for trajectory, error in advance_all(pairs, self.settings.vectorised_steps):
            self._advanced(trajectory, error)
        for request_id in {trajectory.request.id for trajectory in batch} & self._running.keys():
            running = self._running[request_id]
            self._report(request_id, Progress(running.steps_done, running.steps_due))

    def _read_inbox(self, wait: bool) -> None:
        for message in self._inbox.read(idle=wait and self.idle, busy=self._busy or not wait):
            if message is None:
                self._stopping = True
            elif isinstance(message, Arrival):
                self._joining.append((message.request, self._join(message)))
            else:
                self._drop(message)

    def _admit(self) -> None:
        """Bring one request a move nearer to joining; in turns, so that none waits for others' probes."""
        request, joining = self._joining.popleft()
        try:
            next(joining)
            self._joining.append((request, joining))
        except StopIteration:
            pass
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            self._fail(request.id, as_request_error(error, request))

    def _join(self, arrival: Arrival) -> Generator[None]:
        """Turn a request into its trajectories and let them join; stops between the passes of a probe."""
        request = arrival.request
        loras = () if arrival.prepared is None else arrival.prepared.result()  # raises what was wrong
        prompts = self.family.encode_prompts(request, loras)
        trajectories = [self.family.prepare(request, index, prompts, loras) for index in range(request.n)]
        yield from self.shapes.learn(trajectories[0])
        for trajectory in trajectories:
            trajectory.arrived_at = arrival.sent_at
            trajectory.lone = any(self.shapes.must_run_alone(stage) for stage in trajectory.stages())
        steps_due = sum(trajectory.remaining_steps for trajectory in trajectories)
        self._running[request.id] = _Running(request, request.n, steps_due=steps_due)
        (self._denoised if trajectories[0].unchanged else self._active).extend(trajectories)
        self.shapes.forget_old({group_key(s).shared for t in self._active for s in t.stages()})

    def _denoise(self, batch: list[Trajectory]) -> list[tuple[Trajectory, Tensor]]:
        """One forward pass; when it fails, one for each image, so that only the guilty request fails."""
        try:
            return list(zip(batch, self._passes.predict(batch), strict=True))
        except Exception as error:  # the same edge
            if len(batch) == 1:
                self._fail(batch[0].request.id, as_request_error(error, batch[0].request))
                return []
            logger.warning("A pass over %d images failed (%s); each runs alone now.", len(batch), error)
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
        # Outside the handler: inside, the error's frames would keep the memory of the failed pass.
        if out_of_memory:
            torch.cuda.empty_cache()
            self.shapes.limit_rows(group_key(batch[0]).shared, sum(t.rows for t in batch))
        # Not in halves: a pass of one image is the only one that is sure to be among the proved sizes.
        alone = (trajectory for trajectory in batch if trajectory.request.id in self._running)
        return [pair for trajectory in alone for pair in self._denoise([trajectory])]

    def _advanced(self, trajectory: Trajectory, error: Exception | None) -> None:
        running = self._running.get(trajectory.request.id)
        if running is None:  # another image of the request failed in this very step
            return
        if error is not None:
            self._fail(trajectory.request.id, as_request_error(error, trajectory.request))
            return
        running.steps_done += 1
        if not trajectory.remaining_steps:
            self._active.remove(trajectory)
            self._denoised.append(trajectory)

    def _finish(self) -> None:
        """Decode one image here and hand its pixels to the encoding threads."""
        trajectory = self._denoised.popleft()
        request = trajectory.request
        try:
            self._finisher.encode_later(trajectory, self._finisher.decode(trajectory))
        except Exception as error:  # the same edge
            self._fail(request.id, as_request_error(error, request))
            return
        running = self._running[request.id]
        running.images_left -= 1
        if running.images_left == 0:
            del self._running[request.id]

    def _fail(self, request_id: str, error: RequestError) -> None:
        self._drop(request_id)
        self._report(request_id, error)

    def _drop(self, request_id: str) -> None:
        for request, joining in self._joining:
            if request.id == request_id:
                joining.close()
        self._joining = deque(entry for entry in self._joining if entry[0].id != request_id)
        self._active = [t for t in self._active if t.request.id != request_id]
        self._denoised = deque(t for t in self._denoised if t.request.id != request_id)
        self._running.pop(request_id, None)
