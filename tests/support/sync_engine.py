"""An engine in the test's thread: tests submit and cancel between steps by events, not by time."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState
from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.engine import Engine
from hypergen.engine.postprocess import to_pixels
from hypergen.engine.request_queue import RequestQueue
from hypergen.errors import RequestError
from hypergen.events import Event, ImageFinished, Progress
from hypergen.models.cfg import denoise
from hypergen.models.family import Family
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel
from tests.support.fake_cuda import active

_numbers = itertools.count()


def make_request(**changes: Any) -> GenerationRequest:
    """A small, fast request with a unique id."""
    values: dict[str, Any] = {
        "id": f"request-{next(_numbers)}",
        "prompt": "a cat",
        "negative_prompt": None,
        "width": 64,
        "height": 64,
        "num_inference_steps": 4,
        "guidance_scale": 5.0,
        "seed": 7,
        "seed_given": True,
    }
    return GenerationRequest(**{**values, **changes})


def make_settings(**changes: Any) -> EngineSettings:
    return EngineSettings.model_validate({"device": "cpu", "dtype": "float32", **changes})


def served_model(folder: Path, **changes: Any) -> ServedModel:
    """The model in a folder, for a pool."""
    return ServedModel(id="small", path=folder, settings=make_settings(**changes))


FORWARD_S = 0.03
_forwards: WeakKeyDictionary[nn.Module, list[None]] = WeakKeyDictionary()


def forward_clock(family: Family) -> Callable[[], float]:
    """A clock that advances by `FORWARD_S` with each forward pass of the denoiser, and each run of a graph.

    So every forward pass takes the same time, larger batches are more efficient, and batches do not depend on
    the load of the machine.
    """
    denoiser = family.denoiser
    if denoiser not in _forwards:
        forwards = _forwards[denoiser] = []
        denoiser.register_forward_pre_hook(lambda *_: forwards.append(None))
    forwards = _forwards[denoiser]
    return lambda: FORWARD_S * (len(forwards) + active.replays())


class InlineEngine:
    """Runs requests until all of them have ended; `on_event` may submit and cancel others."""

    def __init__(
        self,
        family: Family,
        *,
        clock: Callable[[], float] | None = None,
        buckets: BucketStore | None = None,
        **settings: Any,
    ) -> None:
        self.engine = Engine(
            family,
            "small",
            make_settings(**settings),
            self._report,
            clock=clock or forward_clock(family),
            buckets=buckets,
        )
        self._queue = RequestQueue()
        self.images: dict[str, dict[int, ImageFinished]] = {}
        self.errors: dict[str, RequestError] = {}
        self.progress: list[tuple[str, int]] = []
        self.events: list[tuple[str, Event | RequestError]] = []
        # Request id -> final latents of its first image.
        self.final_latents: dict[str, bytes] = {}
        self._unfinished: dict[str, int] = {}  # request id -> number of images
        self._on_event: Callable[[str, Event | RequestError], None] = lambda _id, _event: None

    @torch.inference_mode()
    def probe_shapes(self, *requests: GenerationRequest) -> None:
        """Probe all batch sizes for the shapes of these requests, as if they had been served before."""
        for request in requests:
            for _ in self.engine.shape_profiles.probe_minimum(prepare_image(self.engine.family, request)):
                pass
        self.engine.shape_profiles.finish_probes()

    def submit(self, request: GenerationRequest) -> None:
        self._unfinished[request.id] = request.n
        self._queue.submit(request)

    def cancel(self, request: GenerationRequest) -> None:
        self._queue.cancel(request.id)
        self._unfinished.pop(request.id, None)

    def run(
        self,
        *requests: GenerationRequest,
        on_event: Callable[[str, Event | RequestError], None] | None = None,
    ) -> None:
        """Run requests until all of them have ended, and close the engine."""
        if on_event:
            self._on_event = on_event
        self.generate(*requests)
        self.engine.close()

    def generate(self, *requests: GenerationRequest) -> None:
        """Run requests until all of them have ended; others may follow, on the shapes that are probed."""
        for request in requests:
            self.submit(request)
        sleep_s = 0.0
        while self._unfinished:
            # Encoding threads finish requests without a message to the queue.
            sleep_s = self.step(min(sleep_s, 0.01))
        self.step()

    def step(self, sleep_s: float = 0.0) -> float:
        for message in self._queue.read(sleep_s):
            if isinstance(message, str):
                self.engine.cancel(message)
            else:
                self.engine.add_request(message)
        return self.engine.step()

    def data(self, request: GenerationRequest, index: int = 0) -> bytes:
        return self.images[request.id][index].data

    def steps(self, request: GenerationRequest) -> int:
        """Steps of the request so far."""
        return max((step for request_id, step in self.progress if request_id == request.id), default=0)

    def state(self, request: GenerationRequest) -> DenoisingState:
        """The state of a running image of the request, for tests to change."""
        return next(state for state in self.engine._running if state.request.id == request.id)

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        self.events.append((request_id, event))
        if isinstance(event, Progress):
            self.progress.append((request_id, event.step))
            if event.step == event.steps:
                state = next(each for each in self.engine._decode_queue if each.request.id == request_id)
                self.final_latents[request_id] = state.latents.cpu().numpy().tobytes()
        self._on_event(request_id, event)
        if isinstance(event, RequestError):
            self.errors[request_id] = event
            self._unfinished.pop(request_id, None)
        elif isinstance(event, ImageFinished):
            images = self.images.setdefault(request_id, {})
            images[event.index] = event
            if len(images) == self._unfinished.get(request_id):
                self._unfinished.pop(request_id, None)


def prepare_image(family: Family, request: GenerationRequest, index: int = 0) -> DenoisingState:
    """The state of one image before its first step."""
    loading = family.load_loras(request)
    loras = () if loading is None else loading.result()
    return family.prepare(request, index, family.encode_prompts(request, loras), loras)


@torch.inference_mode()
def generate_alone(family: Family, request: GenerationRequest, index: int = 0) -> Any:
    """Pixels of one image, uint8, shape (height, width, 3), without an engine and in a batch of one."""
    state = prepare_image(family, request, index)
    while state.remaining_steps:
        state.advance(denoise(family, [state])[0])
    return to_pixels(family.decode(state)).numpy()
