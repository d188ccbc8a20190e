"""Several models in one engine process: scheduling, eviction, and the same images after a reload."""

from __future__ import annotations

import gc
import io
import threading
import time
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


class InlineManager:
    """A model manager in the test's thread, and the events it reported."""

    def __init__(
        self,
        models: list[ServedModel],
        capacity: float | None = None,
        *,
        sizes_known: bool = True,
        host_limit_bytes: float = 0,
        idle_unload_s: float | None = None,
    ) -> None:
        """`capacity` is the memory limit, in models of the first one's size."""
        self.events: list[tuple[str, Event | RequestError]] = []
        self.images: dict[str, bytes] = {}
        self._unfinished: set[str] = set()
        self.on_event: Callable[[str, Event | RequestError], None] = lambda _id, _event: None
        expected = [(m, loading.expected_bytes(m.path, m.settings)) for m in models]
        limit_bytes = None if capacity is None else capacity * expected[0][1]
        if not sizes_known:
            expected = [(model, 0) for model in models]
        self.loader = Loader(self._report, alone=len(models) == 1)
        self.manager = ModelManager(
            expected, limit_bytes, self.loader, self._report, host_limit_bytes, idle_unload_s
        )
        self.model_infos = self.manager.load_all()

    def run(self, *requests: GenerationRequest) -> None:
        self._unfinished = {request.id for request in requests}
        for request in requests:
            self.manager.submit(request)
        while self._unfinished:
            self.manager.step()

    def _report(self, request_id: str, event: Event | RequestError) -> None:
        self.events.append((request_id, event))
        self.on_event(request_id, event)
        if isinstance(event, ImageFinished):
            self.images[request_id] = event.data
        if isinstance(event, ImageFinished | RequestError):
            self._unfinished.discard(request_id)


@pytest.fixture
def models(sd_folder: Path, v_prediction_folder: Path) -> list[ServedModel]:
    """Three of equal size; the first and the last are the same model."""
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


def test_a_request_runs_on_the_model_that_it_names(models: list[ServedModel]) -> None:
    inline = InlineManager(models)
    assert [model_info.id for model_info in inline.model_infos] == list(_NAMES)
    requests = _requests()
    inline.run(*requests, unnamed := make_request(seed=1))
    one, two, three = (_pixels(inline.images[request.id]) for request in requests[:3])
    assert one == three == _pixels(inline.images[unnamed.id])
    assert one != two
    assert inline.manager.status().models == _NAMES
    assert set(inline.manager.status().determinism) == {
        f"{name} {s}" for name in _NAMES for s in ("64x64", "128x128")
    }


def test_models_with_requests_run_round_robin(models: list[ServedModel]) -> None:
    inline = InlineManager(models)
    inline.run(*(make_request(model=name, num_inference_steps=10) for name in _NAMES[:2]))
    steps = [request_id for request_id, event in inline.events if isinstance(event, Progress)]
    assert len(steps) == 20
    # Both run at the same time: the second one's first step comes long before the first one's last.
    assert steps.index(steps[-1]) < 5 or len(set(steps[:6])) == 2


@pytest.mark.parametrize("capacity", [1.5, 2.5])
def test_images_are_the_same_after_models_are_evicted_and_reloaded(
    models: list[ServedModel], capacity: float
) -> None:
    reference, requests = InlineManager(models), _requests()
    reference.run(*requests)
    limited = InlineManager(models, capacity)
    assert limited.manager.status().models[0] == "one"
    for request in requests:  # one after the other: the model of each was evicted
        limited.run(request)
        assert request.model in limited.manager.status().models
        assert len(limited.manager.status().models) == int(capacity)
    assert limited.images == reference.images
    assert limited.manager.status().image_steps == reference.manager.status().image_steps


def test_a_model_with_requests_is_not_evicted_and_no_request_starves(
    models: list[ServedModel],
) -> None:
    inline = InlineManager(models, 1.5)
    first = make_request(model="one", num_inference_steps=8)
    other = make_request(model="two")
    late = [make_request(model="one") for _ in range(3)]

    def submit_more(request_id: str, event: Event | RequestError) -> None:
        if request_id == first.id and isinstance(event, Progress) and event.step == 2:
            for request in (other, *late):
                inline.manager.submit(request)

    inline.on_event = submit_more
    inline.run(first)
    inline.run()  # nothing new
    while len(inline.images) < 5:
        inline.manager.step()
    ended = [request_id for request_id, event in inline.events if isinstance(event, ImageFinished)]
    # The running request finished; then the other model ran, though the first had more requests by then.
    assert ended == [first.id, other.id, *(request.id for request in late)]


def test_a_cancelled_request_does_not_load_its_model(models: list[ServedModel]) -> None:
    inline = InlineManager(models, 1.5)
    first = make_request(model="one", num_inference_steps=4)
    cancelled = make_request(model="two")
    inline.manager.submit(first)
    inline.manager.step()
    inline.manager.submit(cancelled)
    inline.manager.step()
    inline.manager.cancel(cancelled.id)
    while first.id not in inline.images:
        inline.manager.step()
    while inline.manager.step() == 0:
        pass
    assert inline.manager.status().models == ("one",)
    assert cancelled.id not in {request_id for request_id, _ in inline.events}


def test_a_model_that_cannot_be_reloaded_fails_only_its_own_requests(
    models: list[ServedModel], tmp_path: Path
) -> None:
    folder = save_sdxl(tmp_path / "xl")
    large = ServedModel(id="xl", path=folder, settings=make_settings())
    inline = InlineManager([models[0], large], 2)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[:-100])
    broken, fine = make_request(model="xl"), make_request(model="one")
    inline.run(broken, fine)
    (error,) = (event for request_id, event in inline.events if isinstance(event, RequestError))
    assert isinstance(error, GenerationError)
    assert str(folder) not in error.message
    assert fine.id in inline.images
    weights.write_bytes(good)
    inline.run(again := make_request(model="xl"))
    assert again.id in inline.images


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> list[ServedModel]:
    """Two full pipelines."""
    folder = save_pixart(tmp_path_factory.mktemp("pixart"))
    return [ServedModel(id=name, path=folder, settings=make_settings()) for name in _NAMES[:2]]


@pytest.mark.parametrize("at_step", [1, 3])
def test_a_full_pipeline_stops_after_the_step_in_which_its_request_is_cancelled(
    pipelines: list[ServedModel], at_step: int
) -> None:
    inline = InlineManager(pipelines[:1])
    cancelled, last = make_request(num_inference_steps=6), make_request(num_inference_steps=2)

    def cancel(request_id: str, event: Event | RequestError) -> None:
        if request_id == cancelled.id and event == Progress(at_step, 6):
            inline.manager.cancel(cancelled.id)
            inline.manager.submit(last)

    inline.on_event = cancel
    inline.manager.submit(cancelled)
    inline._unfinished = {last.id}
    while inline._unfinished:
        inline.manager.step()
    assert [event for request_id, event in inline.events if request_id == cancelled.id] == [
        Started(),
        *(Progress(step, 6) for step in range(1, at_step + 1)),
    ]


def test_a_request_cancelled_while_a_full_pipeline_runs_is_never_started(
    pipelines: list[ServedModel],
) -> None:
    """For the same model or another, submitted before or during the run."""
    inline = InlineManager(pipelines)
    running = make_request(model="one", num_inference_steps=4)
    before = [make_request(model=name) for name in _NAMES[:2]]
    during = [make_request(model=name) for name in _NAMES[:2]]
    last = [make_request(model=name, num_inference_steps=2) for name in _NAMES[:2]]

    def cancel_waiting(request_id: str, event: Event | RequestError) -> None:
        if request_id == running.id and event == Progress(2, 4):
            for request in during:
                inline.manager.submit(request)
            for request in [*before, *during]:
                inline.manager.cancel(request.id)

    inline.on_event = cancel_waiting
    for request in (running, *before, *last):
        inline.manager.submit(request)
    inline._unfinished = {running.id, *(request.id for request in last)}
    while inline._unfinished:
        inline.manager.step()
    assert set(inline.images) == {running.id, *(request.id for request in last)}
    assert {request_id for request_id, _ in inline.events} == set(inline.images)


def test_a_model_whose_status_is_being_read_is_freed_when_it_is_evicted(
    models: list[ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models have reference cycles: one that is alive at `gc.freeze` would stay until the next eviction."""
    inline = InlineManager(models[:2], 1.5)
    loaded = inline.manager._slots["one"].loaded
    assert loaded is not None
    model = weakref.ref(loaded.engine)
    del loaded
    status, status_is_read, frozen = Engine.status, threading.Event(), threading.Event()

    def read_slowly(engine: Engine) -> EngineStatus:
        status_is_read.set()
        if threading.current_thread() is heartbeat:
            frozen.wait(0.3)  # the eviction waits for this
        return status(engine)

    monkeypatch.setattr(Engine, "status", read_slowly)
    heartbeat = threading.Thread(target=inline.manager.status)
    heartbeat.start()
    status_is_read.wait()
    is_in_memory: list[bool] = []
    monkeypatch.setattr(gc, "freeze", lambda: (is_in_memory.append(model() is not None), frozen.set()))
    inline.run(make_request(model="two"))
    heartbeat.join()
    assert is_in_memory == [False]


@pytest.mark.parametrize("count", [1, 2])
def test_without_requests_all_models_are_unloaded_and_a_request_loads_its_model_again(
    models: list[ServedModel], count: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    requests = [make_request(model=name, seed=3) for name in _NAMES[:count] * 2]
    reference = InlineManager(models[:count])
    reference.run(*requests)
    inline = InlineManager(models[:count], idle_unload_s=1e-9)
    engine = weakref.ref(inline.manager._slots["one"].loaded.engine)  # pyright: ignore[reportOptionalMemberAccess]
    for request in requests:
        inline.manager.step()
        status = inline.manager.status()
        assert (status.state, status.device, status.models) == ("ready", "cpu", ())
        assert engine() is None
        inline.run(request)
    assert inline.images == reference.images
    assert inline.manager.status().image_steps == reference.manager.status().image_steps
    assert "No requests for 0 s: the models leave the device until a request comes." in caplog.text
    assert "Evicted one from memory." in caplog.text


def test_models_stay_until_the_time_without_requests_has_passed(
    models: list[ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    inline = InlineManager(models[:2], idle_unload_s=100)
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    inline.run(make_request(model="one"))
    for seconds, expected in ((99, ("one", "two")), (101, ())):
        monkeypatch.setattr(time, "monotonic", lambda seconds=seconds: now + seconds)
        inline.manager.step()
        assert inline.manager.status().models == expected


def test_a_model_larger_than_the_memory_limit_is_an_error(models: list[ServedModel]) -> None:
    with pytest.raises(ModelError, match=r"one take .* GB, more than the limit of .* GB"):
        InlineManager(models, 0.5)


def test_a_model_that_is_larger_than_expected_evicts_others(models: list[ServedModel]) -> None:
    assert InlineManager(models, 1.5, sizes_known=False).manager.status().models == ("one",)


def test_expected_bytes_are_the_weights_in_memory(models: list[ServedModel]) -> None:
    path, settings = models[0].path, models[0].settings
    loaded = loading.load_any(path, settings)
    assert loading.weight_bytes(loaded.modules) == pytest.approx(
        loading.expected_bytes(path, settings), rel=0.01
    )
    half = make_settings(dtype="bfloat16")
    assert loading.expected_bytes(path, half) * 2 == loading.expected_bytes(path, settings)
