"""CUDA graphs on the fake device: images equal those of eager runs, whatever changes between two replays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.events import Progress
from hypergen.lora.slots import LoraSlots, pack
from hypergen.lora.weights import LayerWeights, Lora
from hypergen.models import loading
from hypergen.request import ControlInput, GenerationRequest, InputImage
from tests.conditioning.test_controlnet import random_controlnet
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.lora_files import EVERYTHING, save_lora
from tests.support.sync_engine import InlineEngine, make_request, make_settings

_STEPS = 4


@pytest.fixture
def device(sd_folder: Path) -> Iterator[FakeCuda]:
    loading.load(sd_folder, make_settings())  # what libraries import must not see the fake device
    with fake_cuda() as device:
        yield device


@pytest.fixture(scope="module")
def lora_files(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    folder = tmp_path_factory.mktemp("loras")
    for seed, name in enumerate("abc"):
        save_lora(folder / f"{name}.safetensors", pipeline, rank=4, targets=EVERYTHING, seed=seed)
    save_lora(folder / "attention.safetensors", pipeline, rank=4, seed=7)
    save_lora(folder / "dora.safetensors", pipeline, rank=4, seed=8, use_dora=True)
    return folder


def _engine(folder: Path, **settings: Any) -> InlineEngine:
    settings = {"device": "cuda", "max_batch_size": 2, **settings}
    return InlineEngine(loading.load(folder, make_settings(**settings)), **settings)


def _serve(engine: InlineEngine, *requests: GenerationRequest) -> None:
    for request in requests:
        engine.submit(request)
    while not all(request.id in engine.images for request in requests):
        assert not engine.errors
        engine.step(0.01)


def _replays(device: FakeCuda) -> int:
    return sum(count for entry, count in device.launches.items() if entry.startswith("graph "))


def _request(seed: int, **changes: Any) -> GenerationRequest:
    return make_request(seed=seed, num_inference_steps=_STEPS, **changes)


def test_the_default_size_is_captured_at_warm_up(sd_folder: Path, device: FakeCuda) -> None:
    engine = _engine(sd_folder)
    engine.engine.warm_up()
    device.reset()
    _serve(engine, _request(1, width=128, height=128))
    assert _replays(device) == _STEPS


# The LoRAs of requests that are served one after another, two at a time; all but the first need no capture.
_CHANGES: list[list[list[tuple[str, float]]]] = [
    [[("a", 1.0)], [("a", 1.0)]],
    [[("a", 1.0)], [("a", 0.3)]],
    [[("b", -0.8)], [("b", 1.0)]],
    [[("a", 1.0)], [("a", 1.0)]],
    [[("c", 1.0)], [("c", 0.5)]],
]
_MIXES: list[list[list[tuple[str, float]]]] = [
    [[("a", 1.0)], [("b", 1.0)]],
    [[("c", 0.4)], [("a", 1.0)]],
    [[("a", 1.0), ("b", 0.5)], [("b", 0.2)]],
    [[("b", 0.2)], [("b", 1.0), ("c", 0.5)]],
]


@pytest.mark.parametrize("choices", [_CHANGES, _MIXES], ids=["one LoRA", "two LoRAs"])
def test_a_graph_serves_whatever_loras_come(
    sd_folder: Path, device: FakeCuda, lora_files: Path, choices: list[Any]
) -> None:
    requests = [
        [_request(10 * i + k, loras=tuple(loras)) for k, loras in enumerate(pair)]
        for i, pair in enumerate(choices)
    ]
    graphs = _engine(sd_folder, lora_dir=(lora_files,))
    eager = _engine(sd_folder, lora_dir=(lora_files,), cuda_graphs=False)
    for i, pair in enumerate(requests):
        device.reset()
        _serve(graphs, *pair)
        if i:
            assert _replays(device) == _STEPS
        _serve(eager, *pair)
        for request in pair:
            assert graphs.data(request) == eager.data(request), request.loras


def test_a_graph_does_not_read_the_memory_of_an_evicted_lora(
    sd_folder: Path, device: FakeCuda, lora_files: Path
) -> None:
    graphs, eager = (
        _engine(sd_folder, lora_dir=(lora_files,), cuda_graphs=cuda_graphs) for cuda_graphs in (True, False)
    )
    first, second = _request(1, loras=(("a", 1.0),)), _request(2, loras=(("b", 1.0),))
    _serve(eager, first, second)
    manager = graphs.engine.family.lora_manager
    assert manager is not None
    ((lora, _),) = manager.load(first.loras)

    def reuse_memory(_id: str, event: object) -> None:
        if isinstance(event, Progress) and event.step == 2 and lora.memory is not None:
            lora.memory.fill_(0xFF)

    graphs.run(first, second, on_event=reuse_memory)
    for request in (first, second):
        assert graphs.data(request) == eager.data(request)


@pytest.mark.parametrize(
    ("loras", "settings"),
    [((("dora", 0.7),), {}), ((("a", 1.0),), {"lora_cache_mb": 0.001})],
    ids=["DoRA", "no room"],
)
def test_loras_that_cannot_be_in_slots_run_eagerly(
    sd_folder: Path, device: FakeCuda, lora_files: Path, loras: Any, settings: dict[str, Any]
) -> None:
    request = _request(1, loras=loras)
    graphs, eager = (
        _engine(sd_folder, lora_dir=(lora_files,), cuda_graphs=cuda_graphs, **settings)
        for cuda_graphs in (True, False)
    )
    _serve(eager, request)
    device.reset()
    _serve(graphs, request)
    assert _replays(device) == 0
    assert graphs.data(request) == eager.data(request)


def _lora(rank: int) -> Lora:
    return pack({"unet.layer": LayerWeights(torch.ones(rank, 64), torch.ones(64, rank))}, "")


def test_slots_are_reused_within_a_limit_of_memory() -> None:
    one, two, other = _lora(4), _lora(4), _lora(8)
    assert one.memory is not None
    assert other.memory is not None
    slots = LoraSlots(other.memory.nbytes)

    def fill(*loras: Lora) -> list[int] | None:
        filled = slots.fill(loras)
        return None if filled is None else [slot.number for slot in filled]

    numbers = fill(one, two)
    assert numbers is not None
    assert fill(two) == numbers[:1]
    assert fill(two, one) == numbers
    assert fill(one, two, other) is None  # more than the limit
    assert fill(other) not in (None, numbers)
    assert set(fill(one) or ()).isdisjoint(numbers)  # evicted for the other layout, and not the same again


def test_a_graph_copies_control_images(
    sd_folder: Path, device: FakeCuda, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    controlnet = tmp_path_factory.mktemp("controlnet") / "edges"
    random_controlnet({"unet": pipeline.unet}, 1).save_pretrained(controlnet)
    settings = {"controlnet": {"edges": str(controlnet)}}

    def request(seed: int, **changes: Any) -> GenerationRequest:
        pixels = np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        image = InputImage(64, 64, pixels.tobytes())
        return _request(3, control=ControlInput(model="edges", image=image, **changes))

    requests = [request(1), request(2), request(2, scale=0.4, end=0.6), _request(3)]
    graphs, eager = (_engine(sd_folder, cuda_graphs=cuda_graphs, **settings) for cuda_graphs in (True, False))
    for number, each in enumerate(requests):
        _serve(eager, each)
        device.reset()
        _serve(graphs, each)
        assert graphs.data(each) == eager.data(each)
        if number in (1, 2):
            assert _replays(device) == _STEPS
    assert len({graphs.data(each) for each in requests}) == len(requests)
