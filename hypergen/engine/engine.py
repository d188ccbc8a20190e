"""The engine: prepares requests, advances their images step by step, finishes them. One thread owns it and
the device.
"""

from __future__ import annotations

import logging
import math
import queue
import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable
from concurrent.futures import Executor, Future
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.probe import synchronize
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.engine.batched_euler import advance_all
from hypergen.engine.optimizations import apply_optimizations
from hypergen.engine.postprocess import PostProcessor, Report
from hypergen.engine.previews import Previewer
from hypergen.engine.request_errors import as_request_error
from hypergen.engine.scheduler import batch_key, next_batch
from hypergen.engine.warmup import generate_once
from hypergen.errors import RequestError
from hypergen.events import EngineStatus, Progress, RequestState, Started
from hypergen.lora.batched_lora import Loras
from hypergen.models.cfg import denoise
from hypergen.models.family import Family
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

_LORA_POLL_S = 0.001
_SHORTEST_TIME_SLICE_S = 0.02


@dataclass(eq=False)
class _RequestProgress:
    """A request from its arrival to its last decoded image.

    Attributes:
        queued_at: by the engine's clock.
        loras: None: it has none.
    """

    request: GenerationRequest
    queued_at: float
    loras: Future[Loras] | None
    state: RequestState = RequestState.WAITING
    images_left: int = 0
    steps_done: int = 0
    total_steps: int = 0


class Engine:
    """Generates the images of the requests that are added, and reports events by request id.

    All methods but `status` belong to the thread that owns the model. Reports come from that thread and, for
    finished images, from the threads that encode files.

    Args:
        clock: seconds by which forward passes are measured and waiting counts; a benchmark gives CPU time.
        encoders: where finished images become files; absent: threads of its own.
    """

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
        apply_optimizations(family, settings)
        self.family = family
        self.model_id = model_id
        self.settings = settings
        self.last_step_at = clock()
        self._clock = clock
        self._report = report
        self._requests: dict[str, _RequestProgress] = {}
        self._waiting: deque[_RequestProgress] = deque()  # for their LoRAs
        self._preparing: deque[tuple[_RequestProgress, Generator[None]]] = deque()
        self._running: list[DenoisingState] = []
        self._decode_queue: deque[DenoisingState] = deque()
        self._forward_s = 0.0  # of the latest forward pass
        self._forwards = 0
        self._image_steps = 0
        # Of encoding threads: the id of a request whose file could not be encoded, or what lost the device.
        self._encoding_failures: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()
        self._postprocessor = PostProcessor(
            family,
            model_id,
            report,
            self._encoding_failures.put,
            clock=clock,
            own_stream=settings.decode_stream,
            encoders=encoders,
        )
        self._previewer = Previewer(family, report, self._postprocessor.encoders)
        self.shapes = ShapeProfiles(family, settings, clock)

    def add_request(self, request: GenerationRequest) -> None:
        """Take a request and start to load its LoRAs."""
        progress = _RequestProgress(request, self._clock(), None)
        self._requests[request.id] = progress
        try:
            progress.loras = self.family.load_loras(request)
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            self._fail(request.id, as_request_error(error, request))
            return
        self._waiting.append(progress)

    def cancel(self, request_id: str) -> None:
        """Take a request out before its next step; nothing more is reported of it."""
        self._drop(request_id, RequestState.CANCELLED)

    @property
    def has_requests(self) -> bool:
        """Whether a request is here that is not decoded yet."""
        return bool(self._requests)

    def status(self) -> EngineStatus:
        return EngineStatus(
            state="ready",
            device=self.family.device.type,
            determinism=self.shapes.verdicts(),
            forwards=self._forwards,
            image_steps=self._image_steps,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Probe the default size and generate an image of it in two steps, so that "ready" was tried.

        Raises:
            GenerationError: the model generates none.
        """
        state = generate_once(self.family, self.family.model_info(self.model_id), self.shapes)
        self._postprocessor.encode(state, self._postprocessor.decode(state))

    def close(self) -> None:
        """Wait for the files that are being written; no step may follow."""
        self._postprocessor.shutdown()

    @torch.inference_mode()
    def step(self) -> float:
        """Prepare requests, advance one batch by one denoising step, decode images.

        Returns:
            Seconds that the thread may sleep before the next step: 0 with work at hand, inf without any.
        """
        self.last_step_at = self._clock()
        had_requests = self.has_requests
        self._drop_what_failed_to_encode()
        self._prepare_those_with_loras()
        self._serve_for_time_slice(lambda: self._preparing, self._prepare_next)
        if batch := self._schedule():
            self._advance(batch, self._predict(batch))
        self._serve_for_time_slice(lambda: self._decode_queue, self._decode_next)
        if self._probe_larger_batches() or len(self._requests) > len(self._waiting):
            return 0.0
        if self._waiting:
            return _LORA_POLL_S
        return 0.0 if had_requests else math.inf

    def _heartbeat(self) -> None:
        """Say that the engine moves; a new size of a compiled model may then take minutes and is no stall."""
        self.last_step_at = math.inf if self.settings.compile != "off" else self._clock()

    def _serve_for_time_slice(
        self, line: Callable[[], Collection[object]], serve: Callable[[], None]
    ) -> None:
        """Serve a line between two steps for about as long as a forward pass takes, so that running images do
        not stall, however much there is to encode, probe or decode.
        """
        until = self._clock() + max(self._forward_s, _SHORTEST_TIME_SLICE_S)
        while line():
            self._heartbeat()
            serve()
            if self._clock() > until:
                return

    def _drop_what_failed_to_encode(self) -> None:
        with suppress(queue.Empty):
            while True:
                failure = self._encoding_failures.get_nowait()
                if isinstance(failure, Exception):
                    raise failure
                self._drop(failure, RequestState.FAILED)  # reported by the thread

    def _prepare_those_with_loras(self) -> None:
        ready = [progress for progress in self._waiting if progress.loras is None or progress.loras.done()]
        for progress in ready:
            self._waiting.remove(progress)
            progress.state = RequestState.PREPARING
            self._preparing.append((progress, self._prepare(progress)))

    def _prepare_next(self) -> None:
        """Prepare one request up to the next forward pass of a probe; in turns, so that none waits for the
        probes of others.
        """
        progress, preparation = self._preparing.popleft()
        try:
            next(preparation)
            self._preparing.append((progress, preparation))
        except StopIteration:
            pass
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            self._fail(progress.request.id, as_request_error(error, progress.request))

    def _prepare(self, progress: _RequestProgress) -> Generator[None]:
        """Make a request's images ready for their first step; stops between the forward passes of a probe."""
        request = progress.request
        loras = () if progress.loras is None else progress.loras.result()  # raises what was wrong
        prompts = self.family.encode_prompts(request, loras)
        states = [self.family.prepare(request, index, prompts, loras) for index in range(request.n)]
        yield from self.shapes.probe_minimum(states[0])
        for state in states:
            state.queued_at = progress.queued_at
            state.must_run_alone = any(
                self.shapes.must_run_alone(stage) for stage in state.with_each_denoiser()
            )
        progress.images_left = request.n
        progress.total_steps = sum(state.remaining_steps for state in states)
        if states[0].skip_denoising:
            progress.state = RequestState.DECODING
            self._decode_queue.extend(states)
        else:
            self._running.extend(states)
        self.shapes.forget_old({batch_key(s).shared for t in self._running for s in t.with_each_denoiser()})

    def _schedule(self) -> list[DenoisingState]:
        """The images of the next denoising step."""
        now = self._clock()
        batch = next_batch(
            self._running, self.shapes.costs, self.settings.max_batch_size, self.settings.aging, now
        )
        if batch:
            self.last_step_at = now
        for progress in self._requests_of(batch):
            if progress.state is RequestState.PREPARING:
                progress.state = RequestState.RUNNING
                self._report(progress.request.id, Started())
        return batch

    def _requests_of(self, images: Iterable[DenoisingState]) -> list[_RequestProgress]:
        """Those that are still here."""
        ids = {image.request.id for image in images}
        return [self._requests[request_id] for request_id in ids if request_id in self._requests]

    def _predict(self, batch: list[DenoisingState]) -> list[tuple[DenoisingState, Tensor]]:
        """One forward pass; when it fails, one for each image, so that only the guilty request fails."""
        try:
            return list(zip(batch, self._run_forward(batch), strict=True))
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            if len(batch) == 1:
                self._fail(batch[0].request.id, as_request_error(error, batch[0].request))
                return []
            logger.warning("A pass over %d images failed (%s); each runs alone now.", len(batch), error)
            out_of_memory = isinstance(error, torch.OutOfMemoryError)
        # Outside the handler: inside, the error's frames would keep the memory of the failed pass.
        if out_of_memory:
            torch.cuda.empty_cache()
            self.shapes.limit_rows(batch_key(batch[0]).shared, sum(t.rows for t in batch))
        # Not in halves: a pass of one image is the only one that is sure to be among the proved sizes.
        alone = (state for state in batch if state.request.id in self._requests)
        return [pair for state in alone for pair in self._predict([state])]

    def _run_forward(self, batch: list[DenoisingState]) -> list[Tensor]:
        """One forward pass over images of one group, measured for the cost curve of its shape.

        Returns:
            A prediction of shape (1, C, h, w) for each.
        """
        started = self._clock()
        predictions = denoise(self.family, batch)
        synchronize(predictions[0])
        self._forward_s = self._clock() - started
        rows = sum(state.rows for state in batch)
        self.shapes.costs[batch_key(batch[0]).shared].record(rows, self._forward_s)
        self._forwards += 1
        self._image_steps += len(batch)
        shared = len({state.request.id for state in batch}) > 1
        for state in batch:
            state.shared_forwards += shared
        return predictions

    def _advance(self, batch: list[DenoisingState], predicted: list[tuple[DenoisingState, Tensor]]) -> None:
        """Take the scheduler step of all images of a batch that are still here."""
        # Another image of a request may have failed in this very batch.
        pairs = [pair for pair in predicted if pair[0].request.id in self._requests]
        for state, prediction in pairs:
            steps = self._requests[state.request.id].total_steps // state.request.n
            self._previewer.maybe_preview(state, prediction, steps)
        for state, error in advance_all(pairs, self.settings.batched_euler):
            self._advanced(state, error)
        for progress in self._requests_of(batch):
            self._report(progress.request.id, Progress(progress.steps_done, progress.total_steps))

    def _advanced(self, state: DenoisingState, error: Exception | None) -> None:
        progress = self._requests.get(state.request.id)
        if progress is None:  # another image of the request failed in this very step
            return
        if error is not None:
            self._fail(state.request.id, as_request_error(error, state.request))
            return
        progress.steps_done += 1
        if progress.steps_done == progress.total_steps:
            progress.state = RequestState.DECODING
        if not state.remaining_steps:
            self._running.remove(state)
            self._decode_queue.append(state)

    def _decode_next(self) -> None:
        """Decode one image here and hand its pixels to the encoding threads."""
        state = self._decode_queue.popleft()
        request = state.request
        try:
            self._postprocessor.submit_encode(state, self._postprocessor.decode(state))
        except Exception as error:  # the edge where one request's trouble must not become everyone's
            self._fail(request.id, as_request_error(error, request))
            return
        progress = self._requests[request.id]
        progress.images_left -= 1
        if progress.images_left == 0:
            progress.state = RequestState.FINISHED
            del self._requests[request.id]

    def _probe_larger_batches(self) -> bool:
        """One forward pass of an unfinished probe, where it is worth it; False: none was."""
        # A request whose prompts are being encoded would wait for the end of a pass that nobody needs yet.
        if self._preparing or (self._waiting and not self._running):
            return False
        shape = self.shapes.next_pending_probe(self._running)
        if shape is None:
            return False
        self._heartbeat()
        self.shapes.probe_next(shape)
        return True

    def _fail(self, request_id: str, error: RequestError) -> None:
        self._drop(request_id, RequestState.FAILED)
        self._report(request_id, error)

    def _drop(self, request_id: str, state: RequestState) -> None:
        progress = self._requests.pop(request_id, None)
        if progress is None:
            return
        if progress.loras is not None:
            progress.loras.cancel()
        for other, preparation in self._preparing:
            if other is progress:
                preparation.close()
        progress.state = state
        self._waiting = deque(other for other in self._waiting if other is not progress)
        self._preparing = deque(entry for entry in self._preparing if entry[0] is not progress)
        self._running = [t for t in self._running if t.request.id != request_id]
        self._decode_queue = deque(t for t in self._decode_queue if t.request.id != request_id)
