"""The whole engine on the fake CUDA device: images equal those of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import IPNDMScheduler, StableDiffusionPipeline

from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.model_loader import Loader
from hypergen.events import Progress
from hypergen.models import loading
from hypergen.request import ControlInput, GenerationRequest
from tests.conditioning.test_controlnet import random_controlnet
from tests.support.compare_devices import assert_close, input_image, make_engine
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.fake_cuda.active import current
from tests.support.fake_cuda.graphs import FakeGraph
from tests.support.samplers import ALL_FLOW_NAMES, SOME_NAMES
from tests.support.small_models import (
    CLIPPING,
    save_flux,
    save_playground,
    save_refiner,
    save_sd,
    save_sd3,
    save_sdxl,
    save_with_scheduler,
    with_default_side,
)
from tests.support.sync_engine import InlineEngine, make_request, make_settings, served_model

_SAVE = {
    "sd": save_sd,
    "sdxl": save_sdxl,
    "flux": save_flux,
    "sd3": save_sd3,
    "playground": save_playground,
    **{name: partial(save_with_scheduler, scheduler=scheduler) for name, scheduler in CLIPPING.items()},
    "ipndm": partial(save_with_scheduler, scheduler=IPNDMScheduler()),
}
_EDM_SAMPLERS = ("dpmpp_2m", "dpmpp_2m_sde", "euler")


@pytest.fixture(scope="module", params=["sd", "sdxl", "flux", "sd3"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = with_default_side(_SAVE[request.param](tmp_path_factory.mktemp("cuda") / request.param), 128)
    # What libraries import at a first load must not see the fake device.
    loading.load(folder, make_settings())
    return folder


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def _assert_equal(folder: Path, cuda: InlineEngine, *requests: GenerationRequest) -> None:
    cpu = make_engine(folder, "cpu")
    cpu.run(*requests)
    for request in requests:
        assert_close(cuda, cpu, request)


def test_images_are_those_of_the_cpu(folder: Path) -> None:
    requests = [make_request(seed=seed, num_inference_steps=steps) for seed, steps in ((1, 4), (2, 6))]
    with fake_cuda():
        engine = make_engine(folder, "cuda")
        engine.engine.warm_up()
        engine.run(*requests)
        assert not engine.errors
    _assert_equal(folder, engine, *requests)


@pytest.mark.parametrize(
    ("family", "samplers"),
    [
        ("sd", SOME_NAMES),
        ("sd3", ALL_FLOW_NAMES),
        ("playground", _EDM_SAMPLERS),
        ("clip_sample", SOME_NAMES),
        ("thresholding", SOME_NAMES),
        ("ipndm", [None]),  # it has no `add_noise`, so that its steps are not known to be linear
    ],
)
def test_all_samplers_give_the_images_of_the_cpu(
    tmp_path: Path, family: str, samplers: Collection[str | None]
) -> None:
    folder = _SAVE[family](tmp_path / family)
    requests = [
        make_request(seed=seed, num_inference_steps=4, sampler=name) for seed, name in enumerate(samplers)
    ]
    loading.load(folder, make_settings())
    with fake_cuda():
        engine = make_engine(folder, "cuda")
        engine.run(*requests)
        assert not engine.errors
    _assert_equal(folder, engine, *requests)


# Kernels whose bits change with the row count, as those of GPUs do: the row counts with equal bits.
_KERNELS: dict[str, Callable[[int], int]] = {
    "1 | 2 or more": lambda rows: min(rows, 2),
    "1, 2 | 3 or more": lambda rows: 0 if rows <= 2 else 1,
    "1, 2 | 3, 4 | 5 to 8 | 9 to 16": lambda rows: (rows - 1).bit_length() or 1,
    "1 | 2 | 3, 4 | 5 to 8 | 9 to 16": lambda rows: (rows - 1).bit_length(),
}


class _PretendedKernels:
    """Lets forward passes give other bits for other row counts, and cost what they should.

    Args:
        cost: of an eager forward pass.
        replay_cost: of a graph.
    """

    def __init__(
        self,
        family: Any,
        kernel: Callable[[int], int],
        cost: Callable[[int], float],
        replay_cost: Callable[[int], float],
    ) -> None:
        self.row_counts: list[int] = []
        self._now = 0.0
        self._graphs: dict[FakeGraph, float] = {}
        self._forward, self._kernel, self._cost, self._replay_cost = family.forward, kernel, cost, replay_cost
        family.forward = self

    def __call__(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(latents)
        self.row_counts.append(rows)
        if (graph := current().capturing) is None:
            self._now += self._cost(rows)
        else:
            self._graphs[graph] = self._replay_cost(rows)
        return self._forward(latents, *args, **kwargs) * (1 + 1e-3 * self._kernel(rows))

    def clock(self) -> float:
        return self._now + sum(graph.replays * seconds for graph, seconds in self._graphs.items())


def _pretending(
    folder: Path,
    kernel: Callable[[int], int],
    cost: Callable[[int], float],
    buckets: BucketStore | None = None,
    replay_cost: Callable[[int], float] | None = None,
    **settings: Any,
) -> tuple[InlineEngine, _PretendedKernels]:
    family = loading.load(folder, make_settings(device="cuda", **settings))
    kernels = _PretendedKernels(family, kernel, cost, replay_cost or cost)
    engine = InlineEngine(family, clock=kernels.clock, buckets=buckets, device="cuda", **settings)
    engine.engine.warm_up()
    return engine, kernels


@pytest.mark.parametrize("kernel", _KERNELS)
def test_batches_are_shared_and_bit_exact_whatever_the_kernels(
    sd_folder: Path, device: FakeCuda, kernel: str
) -> None:
    buckets = BucketStore(
        None, {}
    )  # the engine of one image runs with those of the other, as after a restart
    batched, kernels = _pretending(sd_folder, _KERNELS[kernel], lambda _rows: 0.02, buckets)
    alone, _ = _pretending(sd_folder, _KERNELS[kernel], lambda _rows: 0.02, buckets)
    for seeded in (True, False):
        requests = [make_request(seed=seed, seed_given=seeded) for seed in range(8)]
        before = batched.engine.status()
        batched.generate(*requests)
        status = batched.engine.status()
        assert status.determinism == {"64x64": "exact", "128x128": "exact"}
        assert status.row_counts == {"64x64": (16,), "128x128": (16,)}
        assert (status.image_steps - before.image_steps) / (status.forwards - before.forwards) >= 4
        assert set(kernels.row_counts[-4:]) == {16}
        for request in requests if seeded else requests[3:4]:
            alone.generate(request)
            assert alone.data(request) == batched.data(request)
    for engine in (batched, alone):
        engine.engine.close()


@pytest.mark.parametrize(
    ("cost", "bucket"),
    [
        (lambda _rows: 0.02, 16),
        (lambda rows: 0.02 * (1.0 if rows <= 4 else 2.0), 4),
        (lambda rows: 0.01 * rows, 2),
        (lambda rows: 0.02 + 0.002 * (rows - 2), 4),  # 1.2 times the cost of one image; 8 rows 1.6 times
    ],
)
def test_the_bucket_is_as_large_as_costs_little_more(
    sd_folder: Path, device: FakeCuda, cost: Callable[[int], float], bucket: int
) -> None:
    engine, _ = _pretending(sd_folder, _KERNELS["1 | 2 | 3, 4 | 5 to 8 | 9 to 16"], cost)
    assert engine.engine.status().row_counts == {"128x128": (bucket,)}


@pytest.mark.parametrize(("graphs", "bucket"), [(True, 4), (False, 16)])
def test_the_bucket_has_the_costs_of_the_passes_that_serve(
    sd_folder: Path, device: FakeCuda, graphs: bool, bucket: int
) -> None:
    """Eager forward passes of a small model cost the launches, whatever the rows; graphs do not."""
    engine, _ = _pretending(
        sd_folder,
        lambda _rows: 0,
        lambda _rows: 0.02,
        replay_cost=lambda rows: 0.004 if rows <= 4 else 0.001 * rows,
        cuda_graphs=graphs,
    )
    assert engine.engine.status().row_counts == {"128x128": (bucket,)}


def test_a_bucket_is_not_chosen_again(sd_folder: Path, device: FakeCuda, tmp_path: Path) -> None:
    def start(cost: Callable[[int], float]) -> dict[str, tuple[int, ...]]:
        family = loading.load(sd_folder, make_settings(device="cuda"))
        kernels = _PretendedKernels(family, lambda _rows: 0, cost, cost)
        buckets = BucketStore(tmp_path / "buckets.json", {})
        engine = InlineEngine(family, clock=kernels.clock, buckets=buckets, device="cuda")
        engine.engine.warm_up()
        return engine.engine.status().row_counts

    assert start(lambda _rows: 0.02) == {"128x128": (16,)}
    assert start(lambda rows: 0.01 * rows) == {"128x128": (16,)}


def test_rows_that_depend_on_their_position_get_a_smaller_bucket(sd_folder: Path, device: FakeCuda) -> None:
    family = loading.load(sd_folder, make_settings(device="cuda"))
    forward = family.forward

    def position_dependent(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        output = forward(latents, *args, **kwargs)
        if len(latents) > 4:
            output[0] *= 1.001
        return output

    family.forward = position_dependent
    engine = InlineEngine(family, device="cuda")
    engine.engine.warm_up()
    assert engine.engine.status().row_counts == {"128x128": (4,)}
    assert engine.engine.status().determinism == {"128x128": "exact"}


@pytest.mark.parametrize("images", [1, 8])
def test_a_batch_that_is_out_of_memory_gets_a_smaller_bucket(
    sd_folder: Path, device: FakeCuda, images: int
) -> None:
    memory = 16  # rows that fit

    def cost(rows: int) -> float:
        if rows > memory:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return 0.02

    engine, kernels = _pretending(sd_folder, lambda _rows: 0, cost, cuda_graphs=False)
    memory = 8
    engine.run(*(make_request(seed=seed, width=128, height=128) for seed in range(images)))
    assert not engine.errors
    assert engine.engine.status().row_counts["128x128"] == (8,)
    assert kernels.row_counts[-1] == 8


def test_fast_mode_pads_nothing_and_says_that_bits_differ(sd_folder: Path, device: FakeCuda) -> None:
    engine, kernels = _pretending(sd_folder, lambda rows: rows, lambda _rows: 0.02, determinism="fast")
    engine.run(make_request())
    status = engine.engine.status()
    assert status.row_counts == {}
    assert status.determinism["128x128"] == "close"
    assert kernels.row_counts[-1] == 2


def test_a_shape_runs_as_a_graph_from_its_second_forward_pass_on(
    sd_folder: Path, device: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [make_request(seed=seed, num_inference_steps=5) for seed in range(3)]
    with caplog.at_level("INFO", "hypergen.engine.cuda_graphs"):
        engine = make_engine(sd_folder, "cuda")
        engine.engine.warm_up()
        # Forward pass and decoding of the default size; four row counts were measured before.
        assert caplog.text.count("runs as a CUDA graph") == 2 + 4
        assert caplog.text.count("A measured forward pass") == 4
        engine.run(*requests)
        assert caplog.text.count("The forward pass of latents 16x4x8x8 runs as a CUDA graph") == 1
    graphs = [entry for entry in device.launches if entry.startswith("graph ")]
    # All but the first forward pass and the first decode of each shape, and two of each measured row count.
    assert sum(device.launches[entry] for entry in graphs) == (1 + 4) + (1 + 2) + 2 * (4 + 4)
    eager = make_engine(sd_folder, "cuda", cuda_graphs=False)
    eager.run(*requests)
    for request in requests:
        assert engine.data(request) == eager.data(request)


def test_a_network_that_cannot_be_captured_runs_without_a_graph(
    sd_folder: Path, device: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"device": "cuda", "max_batch_size": 1}
    family = loading.load(sd_folder, make_settings(**settings))
    forward = family.forward

    def waiting(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        latents.sum().item()
        return forward(latents, *args, **kwargs)

    family.forward = waiting
    engine = InlineEngine(family, **settings)
    request = make_request()
    engine.run(request)
    assert not engine.errors
    assert "runs without a CUDA graph" in caplog.text
    plain = make_engine(sd_folder, **settings)
    plain.run(request)
    assert engine.data(request) == plain.data(request)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)."),
    ],
    ids=["CUDA", "cuBLAS", "MPS"],
)
def test_an_image_that_does_not_fit_is_decoded_in_tiles(
    sd_folder: Path, device: FakeCuda, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"device": "cuda", "max_batch_size": 1}
    family = loading.load(sd_folder, make_settings(**settings))
    decode = family.vae.decode

    def limited(latents: torch.Tensor, **kwargs: Any) -> Any:
        if latents.shape[-1] > 16 and not family.vae.use_tiling:
            raise error
        return decode(latents, **kwargs)

    family.vae.decode = limited
    engine = InlineEngine(family, **settings)
    small, large = make_request(width=128, height=128), make_request(width=256, height=256)
    engine.run(small, large)
    assert not engine.errors
    assert caplog.text.count("using tiles") == 1
    assert not family.vae.use_tiling


def test_a_controlnet_gives_the_images_of_the_cpu(
    sd_folder: Path, device: FakeCuda, tmp_path_factory: pytest.TempPathFactory
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    controlnet = tmp_path_factory.mktemp("controlnet") / "edges"
    random_controlnet({"unet": pipeline.unet}, 1).save_pretrained(controlnet)
    requests = [
        make_request(
            seed=seed,
            num_inference_steps=6,
            control=ControlInput(model="edges", image=input_image(seed), scale=scale, end=end),
        )
        for seed, scale, end in ((1, 1.0, 1.0), (2, 0.5, 0.6))
    ]
    settings = {"controlnet": {"edges": str(controlnet)}, "max_batch_size": 2}
    engine, cpu = make_engine(sd_folder, "cuda", **settings), make_engine(sd_folder, "cpu", **settings)
    for run in (engine, cpu):
        run.run(*requests, make_request(seed=3))
        assert not run.errors
    for request in requests:
        assert_close(engine, cpu, request)


def test_a_refiner_gives_the_images_of_the_cpu(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base = save_sdxl(tmp_path_factory.mktemp("refined") / "base")
    settings = {"refiner": str(save_refiner(base.parent / "refiner", base)), "max_batch_size": 2}
    request = make_request(num_inference_steps=8, enable_refiner=True)
    plain = make_request(num_inference_steps=8, seed=8)
    cpu = make_engine(base, "cpu", **settings)
    cpu.run(request, plain)
    with fake_cuda():
        engine = make_engine(base, "cuda", **settings)
        engine.run(request, plain)
    assert not engine.errors
    for one in (request, plain):
        assert_close(engine, cpu, one)


def test_a_cancelled_request_leaves_the_others_their_bytes(sd_folder: Path, device: FakeCuda) -> None:
    kept, cancelled = make_request(seed=1, num_inference_steps=6), make_request(seed=2, num_inference_steps=6)
    engine = make_engine(sd_folder, "cuda", max_batch_size=2)

    def cancel(request_id: str, event: object) -> None:
        if request_id == cancelled.id and isinstance(event, Progress) and event.step == 2:
            engine.cancel(cancelled)

    engine.run(kept, cancelled, on_event=cancel)
    assert cancelled.id not in engine.images
    alone = make_engine(sd_folder, "cuda", max_batch_size=2)
    alone.run(kept)
    assert engine.data(kept) == alone.data(kept)


def test_a_loaded_model_keeps_its_buckets_in_the_state_folder(
    sd_folder: Path, device: FakeCuda, tmp_path: Path
) -> None:
    loader = Loader(lambda _id, _event: None, alone=True, state_folder=tmp_path)
    loader(served_model(sd_folder, device="cuda"), lambda: None)
    ((key, buckets),) = json.loads((tmp_path / "row_buckets.json").read_text()).items()
    assert json.loads(key)["device"] == "Fake GPU"
    assert set(buckets.values()) <= {2, 4, 8, 16}  # by the clock of this machine
