"""LoRA files load in threads: running images and cancelled requests do not wait for them."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from diffusers import StableDiffusionPipeline

from hypergen.errors import InvalidRequestError, RequestError
from hypergen.events import Event, ImageFinished
from hypergen.models import loading
from tests.support.lora_files import save_lora
from tests.support.sync_engine import InlineEngine, make_request, make_settings


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("loras")
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    style = save_lora(folder / "style.safetensors", pipeline)
    (folder / "broken.safetensors").write_bytes(style.read_bytes()[:-10])
    return folder


@pytest.fixture
def family(sd_folder: Path, folder: Path) -> Any:
    return loading.load(sd_folder, make_settings(lora_dir=[str(folder)], lora_cache_mb=0))


@pytest.fixture
def loading_blocked(family: Any) -> threading.Event:
    """Blocks the loading threads until it is set."""
    release = threading.Event()
    for _ in range(family.lora_manager._loading_threads._max_workers):
        family.lora_manager._loading_threads.submit(release.wait, 60)
    return release


def test_images_run_while_a_lora_loads(family: Any, loading_blocked: threading.Event) -> None:
    styled, plain = make_request(loras=(("style", 1.0),)), make_request()
    engine = InlineEngine(family)

    def unblock(request_id: str, event: Event | RequestError) -> None:
        if isinstance(event, ImageFinished) and request_id == plain.id:
            assert not engine.images.get(styled.id)
            loading_blocked.set()

    engine.run(styled, plain, on_event=unblock)
    again = InlineEngine(family)
    again.run(styled)
    assert engine.data(styled) == again.data(styled) != engine.data(plain)


def test_a_request_cancelled_while_its_lora_loads_does_not_run(
    family: Any, loading_blocked: threading.Event
) -> None:
    styled, plain = make_request(loras=(("style", 1.0),)), make_request()
    engine = InlineEngine(family)
    engine.submit(styled)
    engine.step()
    assert engine.engine.has_requests
    engine.submit(plain)
    engine.cancel(styled)
    loading_blocked.set()
    family.lora_manager._loading_threads.shutdown()
    engine.run()
    assert {request_id for request_id, _ in engine.events} == {plain.id}


def test_a_damaged_file_fails_only_its_request(family: Any) -> None:
    broken, plain = make_request(loras=(("broken", 1.0),)), make_request()
    engine = InlineEngine(family)
    engine.run(broken, plain)
    assert isinstance(engine.errors[broken.id], InvalidRequestError)
    assert "is damaged" in engine.errors[broken.id].message
    assert engine.images[plain.id]


def test_a_lora_loaded_in_the_background_is_not_loaded_again(family: Any, folder: Path) -> None:
    weights = (("style", 1.0),)
    prepared = family.lora_manager.load_in_background(weights)
    [(lora, _)] = prepared.result()
    assert family.lora_manager.load(weights)[0][0] is lora
    assert family.lora_manager.load_in_background(()) is None


def test_two_requests_that_load_a_lora_at_the_same_time_share_it(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    both_have_read = threading.Barrier(2, timeout=60)
    pad_rank = family.lora_manager._pad_rank
    waited: set[int] = set()

    def pad(weights: Any) -> Any:
        if threading.get_ident() not in waited:
            waited.add(threading.get_ident())
            both_have_read.wait()
        return pad_rank(weights)

    monkeypatch.setattr(family.lora_manager, "_pad_rank", pad)
    prepared = [family.lora_manager.load_in_background((("style", weight),)) for weight in (1.0, 0.5)]
    [(first, _)], [(second, _)] = (each.result() for each in prepared)
    assert first is second
