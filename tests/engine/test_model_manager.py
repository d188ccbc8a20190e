"""Several models in one engine process: who draws, who leaves memory, and that the pictures stay the same."""

from __future__ import annotations

import gc
import io
import threading
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from hypergen.engine.engine import Engine
from hypergen.engine.model_loader import Loader
from hypergen.engine.model_manager import ModelManager
from hypergen.errors import GenerationError, ModelError, RequestError
from hypergen.events import EngineStatus, Event, ImageFinished, Progress, Started
from hypergen.models import loading
from hypergen.request import GenerationRequest
from hypergen.served_model import ServedModel
from tests.support.full_pipelines import save_pixart
from tests.support.small_models import save_sdxl
from tests.support.sync_engine import make_request, make_settings

_NAMES = ("one", "two", "three")


class _Drawn:
    """A manager in the test's own thread, and what it reported."""

    def __init__(
        self, models: list[ServedModel], room: float | None = None, known_bytes: bool = True
    ) -> None:
        """With room for the weights of so many models of the first one's size."""
        self.events: list[tuple[str, Event | RequestError]] = []
        self.images: dict[str, bytes] = {}
        self._open: set[str] = set()
        self.on_event: Callable[[str, Event | RequestError], None] = lambda _id, _event: None
        expected = [(m, loading.expected_bytes(m.path, m.settings)) for m in models]
        limit = None if room is None else room * expected[0][1]
        if not known_bytes:
            expected = [(model, 0) for model in models]
        self.loader = Loader(self._report, alone=len(models) == 1)
        self.manager = ModelManager(expected, limit, self.loader, self._report)
        self.descriptions = self.manager.load_all()

    def run(self, *requests: GenerationRequest) -> None:
        self._open = {request.id for request in requests}
        for request in requests:
            self.manager.submit(request)
        while self._open:
            self.manager.step()

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        self.events.append((request_id, event))
        self.on_event(request_id, event)
        if isinstance(event, ImageFinished):
            self.images[request_id] = event.data
        if isinstance(event, ImageFinished | RequestError):
            self._open.discard(request_id)


@pytest.fixture
def models(sd_folder: Path, v_prediction_folder: Path) -> list[ServedModel]:
    """Three of equal size; the first and the last draw the same."""
    settings = make_settings()
    folders = (sd_folder, v_prediction_folder, sd_folder)
    return [
        ServedModel(id=name, path=folder, settings=settings)
        for name, folder in zip(_NAMES, folders, strict=True)
    ]


def _requests() -> list[GenerationRequest]:
    return [make_request(model=name, seed=seed) for seed in (1, 2) for name in _NAMES]


def _pixels(data: bytes) -> bytes:
    return Image.open(io.BytesIO(data)).tobytes()


def test_a_request_is_drawn_by_the_model_that_it_names(models: list[ServedModel]) -> None:
    drawn = _Drawn(models)
    assert [description.id for description in drawn.descriptions] == list(_NAMES)
    requests = _requests()
    drawn.run(*requests, unnamed := make_request(seed=1))
    one, two, three = (_pixels(drawn.images[request.id]) for request in requests[:3])
    assert one == three == _pixels(drawn.images[unnamed.id])
    assert one != two
    assert drawn.manager.status().models == _NAMES
    assert set(drawn.manager.status().determinism) == {
        f"{name} {s}" for name in _NAMES for s in ("64x64", "128x128")
    }


def test_models_with_work_take_turns(models: list[ServedModel]) -> None:
    drawn = _Drawn(models)
    drawn.run(*(make_request(model=name, num_inference_steps=10) for name in _NAMES[:2]))
    steps = [request_id for request_id, event in drawn.events if isinstance(event, Progress)]
    assert len(steps) == 20
    # Both are under way at the same time: the second one's first step comes long before the first one's last.
    assert steps.index(steps[-1]) < 5 or len(set(steps[:6])) == 2


@pytest.mark.parametrize("room", [1.5, 2.5])
def test_pictures_are_the_same_when_models_leave_memory_and_come_back(
    models: list[ServedModel], room: float
) -> None:
    undisturbed, requests = _Drawn(models), _requests()
    undisturbed.run(*requests)
    crowded = _Drawn(models, room)
    assert crowded.manager.status().models[0] == "one"
    for request in requests:  # one after the other: each finds its model gone
        crowded.run(request)
        assert request.model in crowded.manager.status().models
        assert len(crowded.manager.status().models) == int(room)
    assert crowded.images == undisturbed.images
    assert crowded.manager.status().image_steps == undisturbed.manager.status().image_steps


def test_a_model_does_not_leave_under_a_running_image_and_nobody_waits_for_ever(
    models: list[ServedModel],
) -> None:
    drawn = _Drawn(models, 1.5)
    first = make_request(model="one", num_inference_steps=8)
    other = make_request(model="two")
    late = [make_request(model="one") for _ in range(3)]

    def crowd(request_id: str, event: Event | RequestError) -> None:
        if request_id == first.id and isinstance(event, Progress) and event.step == 2:
            for request in (other, *late):
                drawn.manager.submit(request)

    drawn.on_event = crowd
    drawn.run(first)
    drawn.run()  # nothing new
    while len(drawn.images) < 5:
        drawn.manager.step()
    ended = [request_id for request_id, event in drawn.events if isinstance(event, ImageFinished)]
    # What ran went on, then came the other model, though its model had more requests by then.
    assert ended == [first.id, other.id, *(request.id for request in late)]


def test_a_cancelled_request_no_longer_asks_for_its_model(models: list[ServedModel]) -> None:
    drawn = _Drawn(models, 1.5)
    first = make_request(model="one", num_inference_steps=4)
    unwanted = make_request(model="two")
    drawn.manager.submit(first)
    drawn.manager.step()
    drawn.manager.submit(unwanted)
    drawn.manager.step()
    drawn.manager.cancel(unwanted.id)
    while first.id not in drawn.images:
        drawn.manager.step()
    while drawn.manager.step() == 0:
        pass
    assert drawn.manager.status().models == ("one",)
    assert unwanted.id not in {request_id for request_id, _ in drawn.events}


def test_a_model_that_cannot_come_back_fails_its_own_requests_alone(
    models: list[ServedModel], tmp_path: Path
) -> None:
    folder = save_sdxl(tmp_path / "xl")
    large = ServedModel(id="xl", path=folder, settings=make_settings())
    drawn = _Drawn([models[0], large], 1.5)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-100])
    broken, fine = make_request(model="xl"), make_request(model="one")
    drawn.run(broken, fine)
    (error,) = (event for request_id, event in drawn.events if isinstance(event, RequestError))
    assert isinstance(error, GenerationError)
    assert str(folder) not in error.message
    assert fine.id in drawn.images
    weights.write_bytes(good)
    drawn.run(again := make_request(model="xl"))
    assert again.id in drawn.images


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """Two full pipelines."""
    folder = save_pixart(tmp_path_factory.mktemp("whole"))
    return [ServedModel(id=name, path=folder, settings=make_settings()) for name in _NAMES[:2]]


@pytest.mark.parametrize("at_step", [1, 3])
def test_a_full_pipeline_stops_at_the_step_after_its_request_is_cancelled(
    pipelines: list[ServedModel], at_step: int
) -> None:
    drawn = _Drawn(pipelines[:1])
    gone, last = make_request(num_inference_steps=6), make_request(num_inference_steps=2)

    def cancel(request_id: str, event: Event | RequestError) -> None:
        if request_id == gone.id and event == Progress(at_step, 6):
            drawn.manager.cancel(gone.id)
            drawn.manager.submit(last)

    drawn.on_event = cancel
    drawn.manager.submit(gone)
    drawn._open = {last.id}
    while drawn._open:
        drawn.manager.step()
    assert [event for request_id, event in drawn.events if request_id == gone.id] == [
        Started(),
        *(Progress(step, 6) for step in range(1, at_step + 1)),
    ]


def test_a_request_cancelled_while_a_full_pipeline_runs_is_never_started(
    pipelines: list[ServedModel],
) -> None:
    """Whether it waits for the same model or another, was handed on already or comes during the run."""
    drawn = _Drawn(pipelines)
    running = make_request(model="one", num_inference_steps=4)
    before = [make_request(model=name) for name in _NAMES[:2]]
    during = [make_request(model=name) for name in _NAMES[:2]]
    last = [make_request(model=name, num_inference_steps=2) for name in _NAMES[:2]]

    def cancel_those_that_wait(request_id: str, event: Event | RequestError) -> None:
        if request_id == running.id and event == Progress(2, 4):
            for request in during:
                drawn.manager.submit(request)
            for request in [*before, *during]:
                drawn.manager.cancel(request.id)

    drawn.on_event = cancel_those_that_wait
    for request in (running, *before, *last):
        drawn.manager.submit(request)
    drawn._open = {running.id, *(request.id for request in last)}
    while drawn._open:
        drawn.manager.step()
    assert set(drawn.images) == {running.id, *(request.id for request in last)}
    assert {request_id for request_id, _ in drawn.events} == set(drawn.images)


def test_a_model_whose_status_is_being_read_is_freed_when_it_is_evicted(
    models: list[ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What lives at `gc.freeze` and lies in cycles, as models do, would stay until the next eviction."""
    drawn = _Drawn(models[:2], 1.5)
    loaded = drawn.manager._slots["one"].loaded
    assert loaded is not None
    model = weakref.ref(loaded.engine)
    del loaded
    status, reading, frozen = Engine.status, threading.Event(), threading.Event()

    def read_slowly(engine: Engine) -> EngineStatus:
        reading.set()
        if threading.current_thread() is heartbeat:
            frozen.wait(0.3)  # so long the eviction waits here at most
        return status(engine)

    monkeypatch.setattr(Engine, "status", read_slowly)
    heartbeat = threading.Thread(target=drawn.manager.status)
    heartbeat.start()
    reading.wait()
    alive: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: (alive.append(model() is not None), frozen.set()))
    drawn.run(make_request(model="two"))
    heartbeat.join()
    assert alive == [False]


def test_a_model_larger_than_the_memory_for_models_is_refused(models: list[ServedModel]) -> None:
    with pytest.raises(ModelError, match=r"one take .* GB, more than the .* GB"):
        _Drawn(models, 0.5)


def test_a_model_that_is_larger_than_expected_sends_others_away(models: list[ServedModel]) -> None:
    assert _Drawn(models, 1.5, known_bytes=False).manager.status().models == ("one",)


def test_weights_are_counted_as_they_lie_in_memory(models: list[ServedModel]) -> None:
    path, settings = models[0].path, models[0].settings
    loaded = loading.load_any(path, settings)
    assert loading.weight_bytes(loaded) == pytest.approx(loading.expected_bytes(path, settings), rel=0.01)
    half = make_settings(dtype="bfloat16")
    assert loading.expected_bytes(path, half) * 2 == loading.expected_bytes(path, settings)
