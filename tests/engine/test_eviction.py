"""Several models on a GPU: evicted to pinned main memory, and back from it as they were."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergen.denoising import host_weights
from hypergen.denoising.host_weights import HostWeights, host_bytes
from hypergen.engine import host_memory
from hypergen.errors import RequestError
from hypergen.events import EngineStatus
from hypergen.models import loading
from hypergen.request import ControlInput
from hypergen.served_model import ServedModel
from tests.conditioning.test_controlnet import random_controlnet
from tests.engine.test_model_manager import InlineManager
from tests.support.compare_devices import input_image
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.fake_cuda.tensors import FakeTensor
from tests.support.full_pipelines import save_pixart
from tests.support.small_models import (
    save_flux,
    save_refiner,
    save_sd,
    save_sd3,
    save_sdxl,
    with_default_side,
)
from tests.support.sync_engine import InlineEngine, make_request, make_settings

_NAMES = ("one", "two", "three")
_SAVE = {"sd": save_sd, "sdxl": save_sdxl, "flux": save_flux, "sd3": save_sd3}


@dataclass
class _Reference:
    """What a server generates whose models are all in memory."""

    images: dict[str, bytes]
    status: EngineStatus


@pytest.fixture(scope="module")
def originals(
    sd_folder: Path, v_prediction_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Three models, warmed up at the size of the requests; the first and the last are the same."""
    return [
        with_default_side(shutil.copytree(folder, tmp_path_factory.mktemp("models") / name), 64)
        for name, folder in zip(_NAMES, (sd_folder, v_prediction_folder, sd_folder), strict=True)
    ]


@pytest.fixture(scope="module")
def reference(originals: list[Path]) -> _Reference:
    # What libraries import at a first load must not see the fake device.
    loading.load(originals[0], make_settings())
    with fake_cuda():
        inline = InlineManager(_models(originals))
        inline.run(*_REQUESTS)
        return _Reference(inline.images, inline.manager.status())


@pytest.fixture
def folders(originals: list[Path], reference: _Reference, tmp_path: Path) -> list[Path]:
    """Copies of the three models, which a test may delete."""
    return [shutil.copytree(original, tmp_path / original.name) for original in originals]


@pytest.fixture
def device(folders: list[Path]) -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def _models(folders: list[Path], **settings: Any) -> list[ServedModel]:
    # One row count, so that no clock chooses it.
    settings = {"device": "cuda", "max_batch_size": 1, **settings}
    return [
        ServedModel(id=name, path=folder, settings=make_settings(**settings))
        for name, folder in zip(_NAMES, folders, strict=False)
    ]


# Each is for another model than the one before, which all come back from an eviction.
_REQUESTS = [
    make_request(model=name, seed=seed, num_inference_steps=2)
    for seed, name in enumerate(("one", "two", "three", "one"))
]


def _host_bytes(folder: Path) -> int:
    return host_bytes(loading.load(folder, make_settings()).modules)


def _of_weights(counter: Any, kind: str = "") -> int:
    """Copies or waits for weights that moved between the device and main memory."""
    files = ("host_weights.py", "model_slot.py")
    return sum(n for entry, n in counter.items() if entry.startswith(kind) and any(f in entry for f in files))


def test_models_come_back_from_pinned_memory_without_their_files(
    folders: list[Path], reference: _Reference, device: FakeCuda
) -> None:
    limited = InlineManager(_models(folders), 1.5, host_limit_bytes=1e9)
    for folder in folders:
        shutil.rmtree(folder)
    turns: list[tuple[int, int, int]] = []
    for request in _REQUESTS:
        device.reset()
        limited.run(request)
        assert limited.manager.status().models == (request.model,)
        turns.append(
            (
                _of_weights(device.copies, "host to device"),
                _of_weights(device.copies, "device to host"),
                _of_weights(device.waits),
            )
        )
    assert limited.images == reference.images
    # The first model was loaded last and is there; its weights are copied when it is evicted for the second.
    assert turns[0] == (0, 0, 0)
    loaded, copied, waited = turns[1]
    assert loaded == 1
    assert copied > 100
    assert waited <= 2
    # From then on a turn is one copy, and one wait for the images of the model before.
    assert {turn[:2] for turn in turns[2:]} == {(1, 0)}
    assert max(turn[2] for turn in turns[2:]) <= 1
    status, expected = limited.manager.status(), reference.status
    assert (status.determinism, status.row_counts) == (expected.determinism, expected.row_counts)
    assert status.image_steps == expected.image_steps


def test_requests_with_loras_give_the_same_images_after_an_eviction(
    folders: list[Path], lora_folder: Path, device: FakeCuda
) -> None:
    limited = InlineManager(_models(folders[:2], lora_dir=(lora_folder,)), 1.5, host_limit_bytes=1e9)
    images: list[bytes] = []
    for name in _NAMES[:2] * 2:
        cancelled, request = (
            make_request(model=name, seed=1, num_inference_steps=2, loras=(("style", 0.8),)) for _ in range(2)
        )
        limited.run(request)
        images.append(limited.images[request.id])
        limited.manager.submit(cancelled)
        limited.manager.step()
        limited.manager.cancel(cancelled.id)  # its LoRA may be loading when the model is evicted
    assert images[:2] == images[2:]
    assert images[0] != images[1]


@pytest.mark.parametrize("copies", [0, 1, 3])
def test_pinned_memory_is_bounded_and_models_without_room_are_loaded_from_their_files(
    folders: list[Path], reference: _Reference, device: FakeCuda, copies: int
) -> None:
    limit = copies * _host_bytes(folders[0])
    limited = InlineManager(_models(folders), 1.5, host_limit_bytes=limit)
    started = dict(limited.loader.seconds)
    for request in _REQUESTS:
        limited.run(request)
        assert device.pinned_bytes <= limit
        kept = [slot for slot in limited.manager._slots.values() if slot.host_weights is not None]
        assert len(kept) <= copies
    assert device.pinned_bytes >= 0.4 * limit
    assert limited.images == reference.images
    assert (limited.loader.seconds == started) == (copies == 3)
    assert limited.manager.status().image_steps == reference.status.image_steps


def test_the_model_that_is_loaded_next_keeps_its_pinned_memory(folders: list[Path], device: FakeCuda) -> None:
    """With room for one, the model that is loaded next is not dropped for the one that leaves."""
    limited = InlineManager(_models(folders[:2]), 1.5, host_limit_bytes=_host_bytes(folders[0]))
    shutil.rmtree(folders[1])  # evicted first, so it is in main memory
    requests = [make_request(model=name, seed=seed) for seed in (1, 2) for name in _NAMES[:2]]
    for request in requests:
        limited.run(request)
    assert limited.images.keys() == {request.id for request in requests}


@pytest.mark.parametrize("pinned_chunks", [0, 3])
def test_without_pinned_memory_a_model_is_loaded_from_its_files(
    folders: list[Path],
    reference: _Reference,
    device: FakeCuda,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    pinned_chunks: int,
) -> None:
    monkeypatch.setattr(host_weights, "_CHUNK_BYTES", 1 << 17)
    device.pinning_fails = lambda _bytes: device.pinned_bytes >= pinned_chunks << 17
    limited = InlineManager(_models(folders), 1.5, host_limit_bytes=1e9)
    for request in _REQUESTS:
        limited.run(request)
    assert "No main memory for the weights of one: CUDA error: out of memory" in caplog.text
    assert limited.images == reference.images
    assert device.pinned_bytes == 0


def test_a_model_that_finds_no_memory_on_the_device_stays_in_main_memory(
    folders: list[Path], device: FakeCuda
) -> None:
    limited = InlineManager(_models(folders[:2]), 1.5, host_limit_bytes=1e9)
    for folder in folders:
        shutil.rmtree(folder)
    size = limited.manager._slots["one"].expected_bytes
    device.fails = lambda nbytes: nbytes > size // 2
    failed, again = make_request(model="two"), make_request(model="two")
    limited.run(failed)
    assert [id for id, event in limited.events if isinstance(event, RequestError)] == [failed.id]
    device.fails = lambda _bytes: False
    limited.run(again)
    assert again.id in limited.images


@pytest.mark.usefixtures("offload_small_networks")
def test_an_offloaded_model_is_loaded_from_its_files(
    folders: list[Path], reference: _Reference, device: FakeCuda
) -> None:
    limited = InlineManager(_models(folders, offload="model"), 1.5, host_limit_bytes=1e9)
    for request in _REQUESTS:
        limited.run(request)
    assert limited.images == reference.images
    assert not any(slot.host_weights for slot in limited.manager._slots.values())


def _bytes_on_device() -> int:
    gc.collect()
    tensors = [o for o in gc.get_objects() if type(o) is FakeTensor and o.owns_memory]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("family", _SAVE)
def test_an_evicted_model_leaves_nothing_on_the_device(
    family: str, tmp_path: Path, lora_folder: Path
) -> None:
    folder = with_default_side(_SAVE[family](tmp_path / "model"), 64)
    settings: dict[str, Any] = {"max_batch_size": 1}
    request: dict[str, Any] = {}
    if family == "sd":
        unet = loading.load(folder, make_settings()).denoiser
        random_controlnet({"unet": unet}, 1).save_pretrained(tmp_path / "control")
        settings |= {"controlnet": {"edges": str(tmp_path / "control")}, "lora_dir": (lora_folder,)}
        request = {"control": ControlInput(model="edges", image=input_image(3), scale=1.0)}
    if family == "sdxl":
        settings |= {"refiner": str(save_refiner(tmp_path / "refiner", folder))}
        request = {"enable_refiner": True}
    loading.load(folder, make_settings(**settings))
    with fake_cuda():
        before = _bytes_on_device()  # of other tests
        model = loading.load(folder, make_settings(device="cuda", **settings))
        engine = InlineEngine(model, device="cuda", **settings)
        engine.engine.warm_up()
        requests = [
            make_request(**request),
            make_request(image=input_image(1), strength=0.6),
            make_request(prompt="a cat and another cat " * 30),
        ]
        if family == "sd":
            requests.append(make_request(loras=(("style", 0.8),)))
        engine.run(*requests)
        assert not engine.errors
        engine.engine.free_memory()
        torch.cuda.synchronize()
        HostWeights(model.modules, torch.device("cuda", 0), pin=True)
        # What remains are the empty prompts.
        empty = sum(cache.get("").nbytes for cache in model.prompt_caches)
        assert _bytes_on_device() - before <= empty + 1000


def test_a_full_pipeline_comes_back_from_pinned_memory(tmp_path: Path) -> None:
    folder = save_pixart(tmp_path / "pixart")
    loading.load_any(folder, make_settings())
    with fake_cuda() as device:
        limited = InlineManager(_models([folder, folder]), 1.5, host_limit_bytes=1e9)
        requests = [make_request(model=name, seed=1, num_inference_steps=2) for name in ("one", "two", "one")]
        for request in requests:
            device.reset()
            limited.run(request)
        assert _of_weights(device.copies, "host to device") == 1
        assert limited.images[requests[0].id] == limited.images[requests[2].id]


@pytest.mark.parametrize("host_gb", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
def test_an_idle_engine_frees_the_device_and_gives_the_same_images_afterwards(
    folders: list[Path], reference: _Reference, lora_folder: Path, host_gb: int, count: int, device: FakeCuda
) -> None:
    before = _bytes_on_device()  # of other tests
    models = _models(folders[:count], lora_dir=(lora_folder,))
    inline = InlineManager(models, host_limit_bytes=host_gb * 1e9, idle_unload_s=1e-9)
    requests = [request for request in _REQUESTS if request.model in _NAMES[:count]]
    started = dict(inline.loader.seconds)
    for request in requests:
        inline.run(request)
        inline.run(make_request(model=request.model, loras=(("style", 0.8),), num_inference_steps=1))
        inline.manager.step()
        status = inline.manager.status()
        assert (status.state, status.device, status.models, status.loras) == ("ready", "cuda", (), 0)
        # Models in main memory keep the embeddings of the empty prompt.
        assert _bytes_on_device() - before < (50_000 * count if host_gb else 1000)
    assert {request.id: inline.images[request.id] for request in requests} == {
        request.id: reference.images[request.id] for request in requests
    }
    assert (dict(inline.loader.seconds) == started) == bool(host_gb)


def test_engines_share_half_of_the_free_memory() -> None:
    free = host_memory.free_bytes()
    assert host_memory.limit_bytes(make_settings(), 4) == pytest.approx(free / 8, rel=0.2)
    assert host_memory.limit_bytes(make_settings(host_memory_gb=3), 4) == 3e9
    assert host_memory.limit_bytes(make_settings(host_memory_gb=0), 1) == 0


@pytest.mark.parametrize(("limit", "expected"), [("1000000", 700_000), ("max", None), ("100", 0)])
def test_the_limit_of_a_container_counts(tmp_path: Path, limit: str, expected: int | None) -> None:
    (tmp_path / "memory.max").write_text(f"{limit}\n", encoding="ascii")
    (tmp_path / "memory.current").write_text("500000\n", encoding="ascii")
    (tmp_path / "memory.stat").write_text("anon 300000\ninactive_file 200000\n", encoding="ascii")
    if expected is None:
        assert host_memory.free_bytes(tmp_path) > 1e6
    else:
        assert host_memory.free_bytes(tmp_path) == expected
