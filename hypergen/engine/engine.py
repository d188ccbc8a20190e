"""The engine of one model, with continuous batching: images join and leave the batch between two steps.

One thread owns the engine and its device.
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
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.batch_invariance.shape_profiles import ShapeProfiles
from hypergen.engine.batch_runner import BatchRunner
from hypergen.engine.compiled_forward import CompiledForward
from hypergen.engine.image_writer import ImageWriter
from hypergen.engine.postprocess import PostProcessor, Report
from hypergen.engine.previews import Previewer
from hypergen.engine.reordered_weights import use_reordered_weights
from hypergen.engine.request_errors import as_request_error, free_cached_memory
from hypergen.engine.scheduler import RunningImages, batch_key
from hypergen.engine.warmup import warm_up_request
from hypergen.errors import ContentPolicyError, RequestError
from hypergen.events import EngineStatus, ForwardPass, Progress, RequestState, Started
from hypergen.lora.batched_lora import Loras
from hypergen.models.family import Family
from hypergen.request import GenerationRequest

logger = logging.getLogger(__name__)

_LORA_POLL_S = 0.001
_MIN_TIME_SLICE_S = 0.02


@dataclass(eq=False)
class _RequestProgress:
    """A request from its arrival to its last decoded image.

    Attributes:
        queued_at: seconds of the engine's clock.
        encode_s: seconds to encode the prompts and to prepare the images.
        loras: None for a request without LoRAs.
    """

    request: GenerationRequest
    queued_at: float
    loras: Future[Loras] | None
    state: RequestState = RequestState.WAITING
    encode_s: float = 0.0
    images_left: int = 0
    steps_done: int = 0
    total_steps: int = 0


class Engine:
    """Generates the images of added requests and reports their events by request id.

    All methods but `status` belong to the thread that owns the model. Events are reported from that thread;
    finished images from the encoder threads.

    Args:
        clock: seconds, for the time of forward passes and of waiting; a benchmark passes CPU time.
        encoders: executor that encodes image files; None: threads of its own.
        buckets: row counts that were chosen in earlier runs.
        on_forward: called after the forward passes of requests.
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
        buckets: BucketStore | None = None,
        on_forward: Callable[[ForwardPass], None] = lambda _: None,
    ) -> None:
        compiled = None if settings.compile == "off" else CompiledForward(family)
        if compiled is None and family.device.type == "cpu":  # compiled code shares the original weights
            use_reordered_weights(family)
        self.family = family
        # Beside those of the family, with weights of their own.
        self.more_networks = () if compiled is None else (compiled.network,)
        self._device = family.device  # where it runs, also while its weights are elsewhere
        self.model_id = model_id
        self.settings = settings
        self.last_step_at = clock()
        self._clock = clock
        self._report = report
        self._requests: dict[str, _RequestProgress] = {}
        self._waiting_for_loras: deque[_RequestProgress] = deque()
        self._preparing: deque[tuple[_RequestProgress, Generator[None]]] = deque()
        self._running = RunningImages()
        self._decode_queue: deque[DenoisingState] = deque()
        # From the encoder threads: the id of a request whose image could not be encoded, or a device error.
        self._encoding_failures: queue.SimpleQueue[str | Exception] = queue.SimpleQueue()
        # With offload, networks are moved and run on one stream.
        own_stream = family.device.type == "cuda" and settings.offload == "off"
        self._postprocessor = PostProcessor(
            family,
            ImageWriter(model_id, settings),
            report,
            self._encoding_failures.put,
            clock=clock,
            own_stream=own_stream,
            graphs=own_stream and settings.cuda_graphs,
            tile_if_needed=settings.vae_tiling == "off",
            free_memory=self._free_memory,
            encoders=encoders,
        )
        # The content filter only checks finished images.
        previews = settings.safety_checker is None
        self._previewer = Previewer(family, report, self._postprocessor.encoders) if previews else None
        self._on_forward = on_forward
        leave_room = self._postprocessor.leave_room
        self.shape_profiles = ShapeProfiles(family, settings, clock, buckets, compiled, leave_room)
        self._runner = BatchRunner(
            family,
            settings,
            self.shape_profiles,
            clock,
            free_memory=self._free_memory,
            leave_room=leave_room,
            on_forward=self._forward_done,
        )

    def add_request(self, request: GenerationRequest) -> None:
        """Add a request and start to load its LoRAs."""
        progress = _RequestProgress(request, self._clock(), None)
        self._requests[request.id] = progress
        try:
            progress.loras = self.family.load_loras(request)
        except Exception as error:  # Isolate the failure: only this request fails.
            self._fail(request.id, as_request_error(error, request))
            return
        self._waiting_for_loras.append(progress)

    def cancel(self, request_id: str) -> None:
        """Remove a request before its next step and report no more events of it."""
        self._remove(request_id, RequestState.CANCELLED)

    @property
    def has_requests(self) -> bool:
        """Whether a request has images that are not decoded yet."""
        return bool(self._requests)

    def status(self) -> EngineStatus:
        return EngineStatus(
            state="ready",
            device=self._device.type,
            determinism=self.shape_profiles.verdicts(),
            row_counts=self.shape_profiles.row_counts(),
            forwards=self._runner.forwards,
            image_steps=self._runner.image_steps,
            loras=self.family.lora_manager.count_in_memory if self.family.lora_manager else 0,
        )

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile, probe the default size and generate an image in two steps, so that "ready" is tested.

        Raises:
            SettingError: torch.compile failed.
            GenerationError: the model cannot generate an image.
        """
        request = warm_up_request(self.family.model_info(self.model_id))
        if self.settings.compile != "off":
            for width, height in self.settings.compile_sizes or [(request.width, request.height)]:
                sized = replace(request, width=width, height=height)
                self.shape_profiles.compile(self.family.prepare(sized, 0, self.family.encode_prompts(sized)))
        state = self.family.prepare(request, 0, self.family.encode_prompts(request))
        if self.family.device.type == "cuda":
            self._postprocessor.decode(state)  # noise, to measure the memory that forward passes must leave
        deque(self.shape_profiles.probe_minimum(state), maxlen=0)
        while state.remaining_steps:
            for _, error in self._runner.step_schedulers([(state, self._runner.run_forward([state])[0])]):
                if error is not None:
                    raise error
        with suppress(ContentPolicyError):  # noise
            self._postprocessor.encode(state, self._postprocessor.decode(state))
        self._runner.forwards = self._runner.image_steps = 0
        # On a CPU nothing overlaps, so the first preview may do it.
        if self._previewer and self.family.device.type != "cpu":
            self._previewer.prepare()

    def free_memory(self) -> None:
        """Free what is on the device but the weights, which may be moved then; only without requests.

        Later steps make all of it again.
        """
        self.shape_profiles.pause_probes()
        self._runner.free_memory()
        self._free_graphs()
        self.family.free_memory()

    def close(self) -> None:
        """Wait until all images are encoded. No step may follow."""
        self.shape_profiles.pause_probes()
        self._postprocessor.shutdown()
        self._runner.close()

    @torch.inference_mode()
    def step(self) -> float:
        """Prepare requests, advance one batch by one denoising step, decode images.

        Returns:
            Seconds that the thread may sleep before the next step: 0 if there is work, inf if there is none.
        """
        self.last_step_at = self._clock()
        had_requests = self.has_requests
        self._handle_encoding_failures()
        self._start_preparing()
        self._run_for_time_slice(lambda: self._preparing, self._prepare_next)
        if batch := self._schedule():
            self._advance(batch, self._predict(batch))
        self._run_for_time_slice(lambda: self._decode_queue, self._decode_next)
        if self._probe_larger_batches() or len(self._requests) > len(self._waiting_for_loras):
            return 0.0
        if self._waiting_for_loras:
            return _LORA_POLL_S
        return 0.0 if had_requests else math.inf

    def _free_memory(self) -> None:
        """Give memory back to a device that has too little: also that of CUDA graphs, which keep theirs."""
        self._free_graphs()
        free_cached_memory()

    def _free_graphs(self) -> None:
        self._runner.clear_graphs()
        if self._postprocessor.graphs is not None:
            self._postprocessor.graphs.clear()

    def _forward_done(self, images: int, rows: int, seconds: float) -> None:
        if self._requests:  # not the warm-up
            self._on_forward(ForwardPass(self.model_id, images, rows, seconds))

    def _heartbeat(self) -> None:
        """Tell the watchdog that the engine works."""
        self.last_step_at = self._clock()

    def _run_for_time_slice(
        self, pending: Callable[[], Collection[object]], process_next: Callable[[], None]
    ) -> None:
        """Process pending work between two steps for about the time of a forward pass.

        So running images do not stall, however many images there are to prepare, probe or decode.
        """
        end = self._clock() + max(self._runner.forward_s, _MIN_TIME_SLICE_S)
        while pending():
            self._heartbeat()
            process_next()
            if self._clock() > end:
                return

    def _handle_encoding_failures(self) -> None:
        with suppress(queue.Empty):
            while True:
                failure = self._encoding_failures.get_nowait()
                if isinstance(failure, Exception):
                    raise failure
                self._remove(failure, RequestState.FAILED)  # the encoder thread reported the error

    def _start_preparing(self) -> None:
        """Start to prepare the requests whose LoRAs are loaded."""
        ready = [
            progress
            for progress in self._waiting_for_loras
            if progress.loras is None or progress.loras.done()
        ]
        for progress in ready:
            self._waiting_for_loras.remove(progress)
            progress.state = RequestState.PREPARING
            self._preparing.append((progress, self._prepare(progress)))

    def _prepare_next(self) -> None:
        """Prepare one request up to the next forward pass of a probe.

        Round-robin, so that no request waits for the probes of another; among API keys by their fair share.
        """
        share = self._running.fair_share
        first = min(self._preparing, key=lambda entry: share.time_of(entry[0].request.api_key))
        self._preparing.remove(first)
        progress, preparation = first
        try:
            next(preparation)
            self._preparing.append((progress, preparation))
        except StopIteration:
            pass
        except Exception as error:  # Isolate the failure: only this request fails.
            self._fail(progress.request.id, as_request_error(error, progress.request))

    def _prepare(self, progress: _RequestProgress) -> Generator[None]:
        """Prepare the images of a request; yields between the forward passes of a probe."""
        request = progress.request
        started_at = time.monotonic()
        loras = () if progress.loras is None else progress.loras.result()  # raises the loading error, if any
        prompts = self.family.encode_prompts(request, loras)
        states = [self.family.prepare(request, index, prompts, loras) for index in range(request.n)]
        if loras and self.shape_profiles.is_compiled(states[0]):
            for state in states:  # compiled code has no LoRAs, so others cannot share their batches
                state.batch_key_extra = (*state.batch_key_extra, "eager")
        yield from self.shape_profiles.probe_minimum(states[0])
        for state in states:
            state.queued_at = progress.queued_at
            state.must_run_alone = any(
                self.shape_profiles.must_run_alone(variant) for variant in state.with_each_denoiser()
            )
        progress.encode_s = time.monotonic() - started_at
        progress.images_left = request.n
        progress.total_steps = sum(state.remaining_steps for state in states)
        if states[0].skip_denoising:
            progress.state = RequestState.DECODING
            self._decode_queue.extend(states)
        else:
            for state in states:
                self._running.add(state)
        if self.shape_profiles.is_full:
            variants = (variant for state in self._running for variant in state.with_each_denoiser())
            self.shape_profiles.evict_oldest({batch_key(variant).shared for variant in variants})

    def _schedule(self) -> list[DenoisingState]:
        """The batch of the next denoising step."""
        now = self._clock()
        settings = self.settings
        batch = self._running.next_batch(
            self.shape_profiles.costs, settings.max_batch_size, settings.aging, now
        )
        if batch:
            self.last_step_at = now
        for progress in self._requests_of(batch):
            if progress.state is RequestState.PREPARING:
                progress.state = RequestState.RUNNING
                self._report(progress.request.id, Started(progress.encode_s))
        return batch

    def _requests_of(self, states: Iterable[DenoisingState]) -> list[_RequestProgress]:
        """The requests of these images, without those that failed or were cancelled."""
        ids = {state.request.id for state in states}
        return [self._requests[request_id] for request_id in ids if request_id in self._requests]

    def _predict(self, batch: list[DenoisingState]) -> list[tuple[DenoisingState, Tensor]]:
        """The predictions of the images that could run; the requests of the others fail."""
        pairs: list[tuple[DenoisingState, Tensor]] = []
        for state, prediction in self._runner.predict(batch):
            if not isinstance(prediction, Exception):
                pairs.append((state, prediction))
            elif state.request.id in self._requests:
                self._fail(state.request.id, as_request_error(prediction, state.request))
        return pairs

    def _advance(self, batch: list[DenoisingState], predicted: list[tuple[DenoisingState, Tensor]]) -> None:
        """Do the scheduler step of the images of a batch and report the progress."""
        # Another image of a request may have failed in the same batch.
        pairs = [pair for pair in predicted if pair[0].request.id in self._requests]
        for state, prediction in pairs:
            steps = self._requests[state.request.id].total_steps // state.request.n
            if self._previewer:
                self._previewer.maybe_preview(state, prediction, steps)
        for state, error in self._runner.step_schedulers(pairs):
            self._record_step(state, error)
        for progress in self._requests_of(batch):
            self._report(progress.request.id, Progress(progress.steps_done, progress.total_steps))

    def _record_step(self, state: DenoisingState, error: Exception | None) -> None:
        progress = self._requests.get(state.request.id)
        if progress is None:  # another image of the request failed in the same step
            return
        if error is not None:
            self._fail(state.request.id, as_request_error(error, state.request))
            return
        progress.steps_done += 1
        if progress.steps_done == progress.total_steps:
            progress.state = RequestState.DECODING
        if state.remaining_steps:
            self._running.advanced(state)
        else:
            self._running.remove(state)
            state.denoised_at = time.monotonic()
            self._decode_queue.append(state)

    def _decode_next(self) -> None:
        """Decode one image and submit its pixels to the encoder threads."""
        state = self._decode_queue.popleft()
        request = state.request
        try:
            self._postprocessor.submit_encode(state, self._postprocessor.decode(state))
        except Exception as error:  # Isolate the failure: only this request fails.
            self._fail(request.id, as_request_error(error, request))
            return
        progress = self._requests[request.id]
        progress.images_left -= 1
        if progress.images_left == 0:
            progress.state = RequestState.FINISHED
            del self._requests[request.id]

    def _probe_larger_batches(self) -> bool:
        """Run one forward pass of an unfinished probe if that is worthwhile. Returns whether it did."""
        # A request that is being prepared would wait for the end of a forward pass that no request needs yet.
        if self._preparing or (self._waiting_for_loras and not self._running):
            return False
        shape = self.shape_profiles.next_pending_probe(self._running)
        if shape is None:
            return False
        self._heartbeat()
        self.shape_profiles.continue_probe(shape)
        return True

    def _fail(self, request_id: str, error: RequestError) -> None:
        self._remove(request_id, RequestState.FAILED)
        self._report(request_id, error)

    def _remove(self, request_id: str, final_state: RequestState) -> None:
        progress = self._requests.pop(request_id, None)
        if progress is None:
            return
        if progress.loras is not None:
            progress.loras.cancel()
        for other, preparation in self._preparing:
            if other is progress:
                preparation.close()
        progress.state = final_state
        self._waiting_for_loras = deque(other for other in self._waiting_for_loras if other is not progress)
        self._preparing = deque(entry for entry in self._preparing if entry[0] is not progress)
        self._running.remove_request(request_id)
        self._decode_queue = deque(state for state in self._decode_queue if state.request.id != request_id)
