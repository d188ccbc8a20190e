"""CUDA graphs on the fake device: images equal those of eager runs, whatever changes between two replays."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.events import Progress
from hypergen.lora.slots import LoraSlots, pack
from hypergen.lora.weights import LayerWeights, Lora, LoraFile
from hypergen.models import loading
from hypergen.request import ControlInput, GenerationRequest, InputImage
from tests.conditioning.test_controlnet import random_controlnet
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.lora_files import EVERYTHING, save_lora
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image

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


def _serve(engine: InlineEngine, *requests: GenerationRequest) -> int:
    """Returns how often the denoiser ran eagerly or in a capture."""
    calls: list[None] = []
    hook = engine.engine.family.denoiser.register_forward_pre_hook(lambda *_: calls.append(None))
    for request in requests:
        engine.submit(request)
    while not all(request.id in engine.images for request in requests):
        assert not engine.errors
        engine.step(0.01)
    hook.remove()
    return len(calls)


def _request(seed: int, **changes: Any) -> GenerationRequest:
    return make_request(seed=seed, num_inference_steps=_STEPS, **changes)


def test_the_default_size_is_captured_at_warm_up(sd_folder: Path, device: FakeCuda) -> None:
    engine = _engine(sd_folder)
    engine.engine.warm_up()
    assert _serve(engine, _request(1, width=128, height=128)) == 0


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
    [[("c", -0.7)], [("b", 0.1)]],
]
_SEVERAL: list[list[list[tuple[str, float]]]] = [
    [[("a", 1.0), ("b", 0.5)], [("b", 0.2)]],
    [[("c", 0.2)], [("c", 1.0), ("b", 0.5)]],
    [[("c", 0.2), ("a", 0.3)], [("c", -1.0)]],
]


@pytest.mark.parametrize(
    "choices", [_CHANGES, _MIXES, _SEVERAL], ids=["one LoRA", "two LoRAs", "two LoRAs in a row"]
)
def test_a_graph_serves_whatever_loras_come(
    sd_folder: Path, device: FakeCuda, lora_files: Path, choices: list[Any]
) -> None:
    requests = [
        [_request(10 * i + k, loras=tuple(loras)) for k, loras in enumerate(pair)]
        for i, pair in enumerate(choices)
    ]
    graphs = _engine(sd_folder, lora_dir=(lora_files,))
    eager = _engine(sd_folder, lora_dir=(lora_files,), cuda_graphs=False)
    manager = graphs.engine.family.lora_manager
    assert manager is not None
    loaded = manager.load(tuple((name, 1.0) for name in "abc"))  # so that both images of a pair start at once
    for i, pair in enumerate(requests):
        assert _serve(graphs, *pair) == 0 or i == 0
        _serve(eager, *pair)
        for request in pair:
            assert graphs.data(request) == eager.data(request), request.loras
    assert len(loaded) == 3


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


def test_loras_load_in_other_threads_while_a_graph_is_captured(
    sd_folder: Path, device: FakeCuda, lora_files: Path
) -> None:
    graphs, eager = (
        _engine(sd_folder, lora_dir=(lora_files,), cuda_graphs=cuda_graphs) for cuda_graphs in (True, False)
    )
    first, second = _request(1, loras=(("a", 1.0),)), _request(2, loras=(("b", 1.0),))
    _serve(eager, first, second)
    family = graphs.engine.family
    assert family.lora_manager is not None
    loading_b = []

    def load(*_: object) -> None:
        if device.capturing is not None:
            loading_b.append(family.load_loras(second))
            loading_b[-1].result()

    hook = family.denoiser.register_forward_pre_hook(load)
    _serve(graphs, first)
    hook.remove()
    assert loading_b
    assert _serve(graphs, second) == 0  # in the slot of the first
    for request in (first, second):
        assert graphs.data(request) == eager.data(request)


def test_a_graph_does_not_run_after_its_slot_was_evicted(
    sd_folder: Path, device: FakeCuda, lora_files: Path
) -> None:
    eager = _engine(sd_folder, lora_dir=(lora_files,), cuda_graphs=False)
    assert eager.engine.family.lora_manager is not None
    loaded = eager.engine.family.lora_manager.load((("a", 1.0), ("attention", 1.0)))
    bytes_of_one = max(lora.nbytes for lora, _ in loaded) * 1.1  # with alignment
    graphs = _engine(sd_folder, lora_dir=(lora_files,), lora_cache_mb=bytes_of_one / 1e6)
    manager = graphs.engine.family.lora_manager
    assert manager is not None
    requests = [_request(seed, loras=((name, 1.0),)) for seed, name in enumerate(("a", "attention", "a"))]
    _serve(graphs, requests[0])
    slots = manager.slots.fill([lora for lora, _ in manager.load(requests[0].loras)])
    assert slots is not None
    _serve(graphs, requests[1])
    for weights in slots[0].layers.values():  # what its memory may have when others use it
        weights.down.fill_(float("nan"))
    assert _serve(graphs, requests[2]) > 0
    _serve(eager, *requests)
    for request in requests:
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
    assert _serve(graphs, request) >= _STEPS
    assert graphs.data(request) == eager.data(request)


def _lora(rank: int) -> Lora:
    return pack(LoraFile({"unet.layer": LayerWeights(torch.ones(rank, 64), torch.ones(64, rank))}), "")


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
        assert _serve(graphs, each) == 0 or number in (0, 3)
        assert graphs.data(each) == eager.data(each)
    assert len({graphs.data(each) for each in requests}) == len(requests)


def test_images_are_decoded_by_a_graph_on_a_stream_of_its_own(sd_folder: Path, device: FakeCuda) -> None:
    sizes = [(64, 64), (64, 64), (96, 64), (64, 64), (96, 64)]
    requests = [_request(seed, width=w, height=h) for seed, (w, h) in enumerate(sizes)]
    graphs, eager = (_engine(sd_folder, cuda_graphs=cuda_graphs) for cuda_graphs in (True, False))
    decoded: list[tuple[int, int]] = []
    graphs.engine.family.vae.decoder.register_forward_pre_hook(
        lambda _module, inputs: decoded.append((inputs[0].shape[-1] * 8, inputs[0].shape[-2] * 8))
    )
    for request in requests:
        _serve(graphs, request)
        _serve(eager, request)
        assert graphs.data(request) == eager.data(request)
    # Eagerly, then before and in the capture.
    assert [decoded.count(size) for size in ((64, 64), (96, 64))] == [3, 3]
    graphs.run(*[_request(seed) for seed in range(6)])  # decoded while others run
    assert not graphs.errors


def test_a_decoder_that_cannot_be_captured_runs_without_a_graph(
    sd_folder: Path, device: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [_request(seed) for seed in range(3)]
    eager, graphs = (_engine(sd_folder, cuda_graphs=cuda_graphs) for cuda_graphs in (False, True))

    def wait(_module: object, inputs: tuple[torch.Tensor, ...]) -> None:
        inputs[0].sum().item()

    graphs.engine.family.vae.decoder.register_forward_pre_hook(wait)
    for request in requests:
        _serve(eager, request)
        _serve(graphs, request)
        assert graphs.data(request) == eager.data(request)
    assert caplog.text.count("Decoding of latents 1x4x8x8 runs without a CUDA graph") == 1


def test_graphs_give_their_memory_back_when_it_is_needed(sd_folder: Path, device: FakeCuda) -> None:
    graphs, eager = (_engine(sd_folder, cuda_graphs=cuda_graphs) for cuda_graphs in (True, False))
    small, large = [_request(seed) for seed in range(2)], _request(3, width=96, height=96)
    _serve(graphs, *small)
    graphs.probe_shapes(large)
    device.fails = lambda size: size > 10_000 and bool(device.graphs)
    _serve(graphs, large)
    device.fails = lambda _size: False
    _serve(eager, large)
    assert graphs.data(large) == eager.data(large)
    buckets = [each.engine.status().row_counts["96x96"] for each in (graphs, eager)]
    assert buckets[0] == buckets[1]  # no smaller one, and so the same bits


def test_a_stopped_probe_frees_its_memory(sd_folder: Path) -> None:
    """Of a cancelled request at once, and of an engine that is not closed as garbage, without an error."""
    loading.load(sd_folder, make_settings())  # what libraries import must not see the fake device
    with fake_cuda() as device:
        engine = _engine(sd_folder).engine
        states = [prepare_image(engine.family, _request(1, width=side, height=side)) for side in (64, 96)]
        gc.collect()
        before = len(device.graphs), device.allocated
        cancelled = engine.shape_profiles.probe_minimum(states[0])
        while len(device.graphs) == before[0]:
            next(cancelled)
        assert device.allocated > before[1]
        gc.disable()
        del cancelled
        after = len(device.graphs), device.allocated
        gc.enable()
        assert after == before
        unfinished = engine.shape_profiles.probe_minimum(states[1])
        while len(device.graphs) == before[0]:
            next(unfinished)
    del engine, states, unfinished
    gc.collect()
