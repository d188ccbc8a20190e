"""An engine in the test's own thread: what happens between steps is decided by events, not by clocks."""

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

_numbers = itertools.count()


def make_request(**changes: Any) -> GenerationRequest:
    """A small quick request with an id of its own."""
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


def served(folder: Path, **changes: Any) -> ServedModel:
    """The model in a folder as a pool wants it."""
    return ServedModel(id="small", path=folder, settings=make_settings(**changes))


PASS_S = 0.03
_passes: WeakKeyDictionary[nn.Module, list[None]] = WeakKeyDictionary()


def passes_of(family: Family) -> Callable[[], float]:
    """A clock that moves with the passes of a denoiser.

    All of them take as long then, larger ones draw more in it, and who shares one does not depend on how busy
    the machine is.
    """
    denoiser = family.denoiser
    if denoiser not in _passes:
        made = _passes[denoiser] = []
        denoiser.register_forward_pre_hook(lambda *_: made.append(None))
    made = _passes[denoiser]
    return lambda: PASS_S * len(made)


class InlineEngine:
    """Draws requests until all of them have ended; `on_event` may submit and cancel more on the way."""

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
            clock=clock or passes_of(family),
            buckets=buckets,
        )
        self._queue = RequestQueue()
        self.images: dict[str, dict[int, ImageFinished]] = {}
        self.errors: dict[str, RequestError] = {}
        self.progress: list[tuple[str, int]] = []
        self.events: list[tuple[str, Event | RequestError]] = []
        self.trace: dict[str, bytes] = {}  # the last latents of each request's first image, bit by bit
        self._open: dict[str, int] = {}
        self._on_event: Callable[[str, Event | RequestError], None] = lambda _id, _event: None

    @torch.inference_mode()
    def know(self, *requests: GenerationRequest) -> None:
        """Prove every size of a pass for the shapes of these requests, as if they had been served before."""
        for request in requests:
            for _ in self.engine.shape_profiles.probe_minimum(prepare_image(self.engine.family, request)):
                pass
        self.engine.shape_profiles.finish_probes()

    def submit(self, request: GenerationRequest) -> None:
        self._open[request.id] = request.n
        self._queue.submit(request)

    def cancel(self, request: GenerationRequest) -> None:
        self._queue.cancel(request.id)
        self._open.pop(request.id, None)

    def run(
        self,
        *requests: GenerationRequest,
        on_event: Callable[[str, Event | RequestError], None] | None = None,
    ) -> None:
        if on_event:
            self._on_event = on_event
        for request in requests:
            self.submit(request)
        sleep_s = 0.0
        while self._open:
            # Threads that encode files end requests without a message.
            sleep_s = self.step(min(sleep_s, 0.01))
        self.step()
        self.engine.close()

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
        """Steps that the request has taken so far."""
        return max((step for request_id, step in self.progress if request_id == request.id), default=0)

    def state(self, request: GenerationRequest) -> DenoisingState:
        """A running image of the request, to be tampered with."""
        return next(t for t in self.engine._running if t.request.id == request.id)

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        self.events.append((request_id, event))
        if isinstance(event, Progress):
            self.progress.append((request_id, event.step))
            if event.step == event.steps:
                state = next(t for t in self.engine._decode_queue if t.request.id == request_id)
                self.trace[request_id] = state.latents.cpu().numpy().tobytes()
        self._on_event(request_id, event)
        if isinstance(event, RequestError):
            self.errors[request_id] = event
            self._open.pop(request_id, None)
        elif isinstance(event, ImageFinished):
            images = self.images.setdefault(request_id, {})
            images[event.index] = event
            if len(images) == self._open.get(request_id):
                self._open.pop(request_id, None)


def prepare_image(family: Family, request: GenerationRequest, index: int = 0) -> DenoisingState:
    """One image before its first step."""
    loading = family.load_loras(request)
    loras = () if loading is None else loading.result()
    return family.prepare(request, index, family.encode_prompts(request, loras), loras)


@torch.inference_mode()
def draw_alone(family: Family, request: GenerationRequest, index: int = 0) -> Any:
    """Pixels of one image, by the family alone: no engine, no neighbours."""
    state = prepare_image(family, request, index)
    while state.remaining_steps:
        state.advance(denoise(family, [state])[0])
    return to_pixels(family.decode(state)).numpy()
