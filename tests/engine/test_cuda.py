"""The whole engine on the fake CUDA device: images equal those of the CPU."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from hypergen.engine.accelerator_step import AcceleratorStep
from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.model_loader import Loader
from hypergen.events import Preview, Progress
from hypergen.models import loading
from hypergen.request import ControlInput, GenerationRequest, InputImage
from tests.conditioning.test_controlnet import random_controlnet
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.lora_files import ATTENTION, EVERYTHING, save_lora
from tests.support.small_models import save_flux, save_refiner, save_sd, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image, served_model

_SAVE = {"sd": save_sd, "sdxl": save_sdxl, "flux": save_flux, "sd3": save_sd3}


@pytest.fixture(scope="module", params=_SAVE)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = _SAVE[request.param](tmp_path_factory.mktemp("cuda") / request.param)
    # What libraries import at a first load must not see the fake device.
    loading.load(folder, make_settings())
    return folder


@pytest.fixture
def device() -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


def _engine(folder: Path, device: str, **settings: Any) -> InlineEngine:
    family = loading.load(folder, make_settings(device=device, **settings))
    return InlineEngine(family, device=device, **settings)


def _pixels(engine: InlineEngine, request: GenerationRequest) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(engine.data(request)))).astype(int)


def _assert_equal(folder: Path, cuda: InlineEngine, *requests: GenerationRequest) -> None:
    """Images of the device differ from the CPU's by the rounding of single values."""
    cpu = _engine(folder, "cpu")
    cpu.run(*requests)
    for request in requests:
        assert np.abs(_pixels(cuda, request) - _pixels(cpu, request)).max() <= 1


def test_images_are_those_of_the_cpu(folder: Path) -> None:
    requests = [make_request(seed=seed, num_inference_steps=steps) for seed, steps in ((1, 4), (2, 6))]
    with fake_cuda():
        engine = _engine(folder, "cuda")
        engine.engine.warm_up()
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
    """Lets forward passes give other bits for other row counts, and cost what they should."""

    def __init__(self, family: Any, kernel: Callable[[int], int], cost: Callable[[int], float]) -> None:
        self.now = 0.0
        self.row_counts: list[int] = []
        self._forward, self._kernel, self._cost = family.forward, kernel, cost
        family.forward = self

    def __call__(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = len(latents)
        self.row_counts.append(rows)
        self.now += self._cost(rows)
        return self._forward(latents, *args, **kwargs) * (1 + 1e-3 * self._kernel(rows))

    def clock(self) -> float:
        return self.now


def _pretending(
    folder: Path, kernel: Callable[[int], int], cost: Callable[[int], float], **settings: Any
) -> tuple[InlineEngine, _PretendedKernels]:
    family = loading.load(folder, make_settings(device="cuda", **settings))
    kernels = _PretendedKernels(family, kernel, cost)
    engine = InlineEngine(family, clock=kernels.clock, device="cuda", **settings)
    engine.engine.warm_up()
    return engine, kernels


@pytest.mark.parametrize("seeded", [True, False])
@pytest.mark.parametrize("kernel", _KERNELS)
def test_batches_are_shared_and_bit_exact_whatever_the_kernels(
    sd_folder: Path, device: FakeCuda, kernel: str, seeded: bool
) -> None:
    requests = [make_request(seed=seed, seed_given=seeded) for seed in range(8)]
    batched, kernels = _pretending(sd_folder, _KERNELS[kernel], lambda _rows: 0.02)
    batched.run(*requests)
    status = batched.engine.status()
    assert status.determinism == {"64x64": "exact", "128x128": "exact"}
    assert status.row_counts == {"64x64": (16,), "128x128": (16,)}
    assert status.image_steps / status.forwards >= 4
    assert set(kernels.row_counts[-4:]) == {16}
    alone, _ = _pretending(sd_folder, _KERNELS[kernel], lambda _rows: 0.02)
    alone.run(requests[3])
    assert alone.data(requests[3]) == batched.data(requests[3])


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


def test_a_bucket_is_not_chosen_again(sd_folder: Path, device: FakeCuda, tmp_path: Path) -> None:
    def start(cost: Callable[[int], float]) -> dict[str, tuple[int, ...]]:
        family = loading.load(sd_folder, make_settings(device="cuda"))
        kernels = _PretendedKernels(family, lambda _rows: 0, cost)
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


def test_fast_mode_pads_nothing(sd_folder: Path, device: FakeCuda) -> None:
    engine, kernels = _pretending(sd_folder, lambda _rows: 0, lambda _rows: 0.02, determinism="fast")
    engine.run(make_request())
    assert engine.engine.status().row_counts == {}
    assert kernels.row_counts[-1] == 2


def _input_image(seed: int, side: int = 64) -> InputImage:
    pixels = np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8)
    return InputImage(side, side, pixels.tobytes())


def _mask(side: int = 64) -> InputImage:
    right_half = np.repeat((np.arange(side)[None] >= side // 2).astype(np.uint8) * 255, side, 0)
    return InputImage(side, side, right_half.tobytes())


_CONDITIONS: dict[str, dict[str, Any]] = {
    "image to image": {"image": _input_image(1), "strength": 0.6},
    "inpainting": {"image": _input_image(2), "mask": _mask(), "strength": 0.9},
    "unguided": {"guidance_scale": 1.0},
    "long prompt": {"prompt": "a cat and another cat " * 30},
    "previews": {"partial_images": 2},
}


@pytest.mark.parametrize(
    "sampler", [None, "euler_a", "dpmpp_2m_karras", "dpmpp_3m_sde_exponential", "heun", "unipc_beta"]
)
def test_conditions_give_the_images_of_the_cpu(
    sd_folder: Path, device: FakeCuda, sampler: str | None
) -> None:
    requests = {
        condition: make_request(num_inference_steps=6, sampler=sampler, **changes)
        for condition, changes in _CONDITIONS.items()
    }
    engine, cpu = _engine(sd_folder, "cuda"), _engine(sd_folder, "cpu")
    for run in (engine, cpu):
        run.run(*requests.values())
        assert not run.errors
    for condition, request in requests.items():
        assert np.abs(_pixels(engine, request) - _pixels(cpu, request)).max() <= 1, condition
        ours, theirs = _previews(engine, request), _previews(cpu, request)
        assert len(ours) == len(theirs) == request.partial_images
        for one, other in zip(ours, theirs, strict=True):
            assert np.abs(one - other).max() <= 2


def _previews(engine: InlineEngine, request: GenerationRequest) -> list[np.ndarray]:
    return [
        np.asarray(Image.open(BytesIO(event.data))).astype(int)
        for request_id, event in engine.events
        if request_id == request.id and isinstance(event, Preview)
    ]


def test_a_shape_runs_as_a_graph_from_its_second_forward_pass_on(
    sd_folder: Path, device: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    requests = [make_request(seed=seed, num_inference_steps=5) for seed in range(3)]
    with caplog.at_level("INFO", "hypergen.engine.cuda_graphs"):
        engine = _engine(sd_folder, "cuda")
        engine.engine.warm_up()
        assert caplog.text.count("runs as a CUDA graph") == 2  # forward pass and decoding of the default size
        engine.run(*requests)
        assert caplog.text.count("The forward pass of latents 16x4x8x8 runs as a CUDA graph") == 1
    graphs = [entry for entry in device.launches if entry.startswith("graph ")]
    # All but the first forward pass and the first decode of each shape.
    assert sum(device.launches[entry] for entry in graphs) == (1 + 4) + (1 + 2)
    eager = _engine(sd_folder, "cuda", cuda_graphs=False)
    eager.run(*requests)
    for request in requests:
        assert engine.data(request) == eager.data(request)


def test_a_network_that_cannot_be_captured_runs_without_a_graph(
    sd_folder: Path, device: FakeCuda, caplog: pytest.LogCaptureFixture
) -> None:
    family = loading.load(sd_folder, make_settings(device="cuda"))
    forward = family.forward

    def waiting(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        latents.sum().item()
        return forward(latents, *args, **kwargs)

    family.forward = waiting
    engine = InlineEngine(family, device="cuda")
    request = make_request()
    engine.run(request)
    assert not engine.errors
    assert "runs without a CUDA graph" in caplog.text
    plain = _engine(sd_folder, "cuda")
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
    family = loading.load(sd_folder, make_settings(device="cuda"))
    decode = family.vae.decode

    def limited(latents: torch.Tensor, **kwargs: Any) -> Any:
        if latents.shape[-1] > 16 and not family.vae.use_tiling:
            raise error
        return decode(latents, **kwargs)

    family.vae.decode = limited
    engine = InlineEngine(family, device="cuda")
    small, large = make_request(width=128, height=128), make_request(width=256, height=256)
    engine.run(small, large)
    assert not engine.errors
    assert caplog.text.count("using tiles") == 1
    assert not family.vae.use_tiling


@pytest.fixture(scope="module")
def lora_files(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    folder = tmp_path_factory.mktemp("loras")
    save_lora(folder / "attention.safetensors", pipeline, rank=4, targets=ATTENTION, seed=1)
    save_lora(folder / "everything.safetensors", pipeline, rank=8, targets=EVERYTHING, seed=2)
    save_lora(folder / "another.safetensors", pipeline, rank=8, targets=EVERYTHING, seed=4)
    save_lora(folder / "third.safetensors", pipeline, rank=8, targets=EVERYTHING, seed=5)
    save_lora(folder / "dora.safetensors", pipeline, rank=8, targets=ATTENTION, seed=3, use_dora=True)
    return folder


_LORAS: list[tuple[tuple[str, float], ...]] = [
    (),
    (("attention", 1.0),),
    (("attention", 0.5),),
    (("everything", 0.7),),
    (("attention", -0.3), ("everything", 0.5)),
    (("another", 0.4), ("attention", 0.2), ("dora", 0.6), ("everything", 0.5)),
    (("dora", 0.8),),
]


def test_loras_of_other_rows_do_not_change_an_image(
    sd_folder: Path, device: FakeCuda, lora_files: Path
) -> None:
    requests = [make_request(seed=seed, loras=loras) for seed, loras in enumerate(_LORAS)]
    batched = _engine(sd_folder, "cuda", lora_dir=(lora_files,))
    batched.probe_shapes(requests[0])
    batched.run(*requests)
    assert not batched.errors
    cpu = _engine(sd_folder, "cpu", lora_dir=(lora_files,))
    cpu.run(*requests)
    for request in requests:
        assert np.abs(_pixels(batched, request) - _pixels(cpu, request)).max() <= 1
        alone = _engine(sd_folder, "cuda", lora_dir=(lora_files,))
        alone.run(request)
        assert alone.data(request) == batched.data(request), request.loras


_ONE, _OTHER, _THIRD = ("everything", 0.7), ("another", -0.5), ("third", 0.2)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("rows", "launches", "launches_of_convolutions"),
    [
        ([(_ONE,)] * 4, 3, 3),
        ([(_ONE,)] * 3 + [()], 7, 4),
        ([(_ONE,)] * 2 + [(_OTHER,)] * 2, 7, 7),
        ([(_ONE,), (_OTHER,), (_THIRD,), ()], 7, 10),
        ([(_ONE, _OTHER)] * 4, 6, 6),
        ([(_ONE, _OTHER), (_OTHER, _THIRD), (_THIRD,), ()], 10, 10),
    ],
    ids=["one LoRA", "a row without", "two LoRAs", "three LoRAs", "two in each row", "up to two in a row"],
)
def test_launches_of_loras_for_each_layer(
    sd_folder: Path,
    device: FakeCuda,
    lora_files: Path,
    rows: list[Any],
    launches: int,
    launches_of_convolutions: int,
    memory_format: torch.memory_format,
) -> None:
    family = loading.load(sd_folder, make_settings(device="cuda", lora_dir=(lora_files,)))
    family.denoiser.to(memory_format=memory_format)  # pyright: ignore[reportCallIssue]  torch's stub lacks it
    step = AcceleratorStep(family, graphs=False)

    def count(loras: list[Any]) -> int:
        states = [prepare_image(family, make_request(seed=i, loras=own)) for i, own in enumerate(loras)]
        step.predict(states, 8)
        device.reset()
        step.predict(states, 8)
        assert not device.waits
        return sum(device.launches.values())

    with torch.inference_mode():
        added = count(rows) - count([()] * 4)
    assert family.lora_manager is not None
    ((lora, _),) = family.lora_manager.load((("everything", 1.0),))
    layers = [weights for name, weights in lora.layers.items() if name.startswith("unet")]
    convolutions = sum(weights.down.dim() > 2 for weights in layers)
    assert convolutions
    assert added == launches * (len(layers) - convolutions) + launches_of_convolutions * convolutions
    step.close()


def test_an_infinite_product_harms_only_the_rows_of_its_lora(
    sd_folder: Path, device: FakeCuda, lora_files: Path
) -> None:
    settings = {"lora_dir": (lora_files,), "determinism": "strict"}
    family = loading.load(sd_folder, make_settings(device="cuda", **settings))
    assert family.lora_manager is not None
    ((broken, _),) = family.lora_manager.load((("everything", 1.0),))
    for weights in broken.layers.values():
        weights.down.fill_(torch.finfo(torch.float32).max)
    requests = [make_request(seed=seed, loras=_LORAS[choice]) for seed, choice in enumerate((3, 0, 1))]
    engine = InlineEngine(family, device="cuda", **settings)
    engine.run(*requests)
    assert list(engine.errors) == [requests[0].id]
    for request in requests[1:]:
        alone = _engine(sd_folder, "cuda", **settings)
        alone.run(request)
        assert alone.data(request) == engine.data(request)


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
            control=ControlInput(model="edges", image=_input_image(seed), scale=scale, end=end),
        )
        for seed, scale, end in ((1, 1.0, 1.0), (2, 0.5, 0.6))
    ]
    settings = {"controlnet": {"edges": str(controlnet)}}
    engine, cpu = _engine(sd_folder, "cuda", **settings), _engine(sd_folder, "cpu", **settings)
    for run in (engine, cpu):
        run.run(*requests, make_request(seed=3))
        assert not run.errors
    for request in requests:
        assert np.abs(_pixels(engine, request) - _pixels(cpu, request)).max() <= 1


def test_a_refiner_gives_the_images_of_the_cpu(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    base = save_sdxl(tmp_path_factory.mktemp("refined") / "base")
    settings = {"refiner": str(save_refiner(base.parent / "refiner", base))}
    request = make_request(num_inference_steps=8, enable_refiner=True)
    plain = make_request(num_inference_steps=8, seed=8)
    cpu = _engine(base, "cpu", **settings)
    cpu.run(request, plain)
    with fake_cuda():
        engine = _engine(base, "cuda", **settings)
        engine.run(request, plain)
    assert not engine.errors
    for one in (request, plain):
        assert np.abs(_pixels(engine, one) - _pixels(cpu, one)).max() <= 1


def test_a_cancelled_request_leaves_the_others_their_bytes(sd_folder: Path, device: FakeCuda) -> None:
    kept, cancelled = make_request(seed=1, num_inference_steps=6), make_request(seed=2, num_inference_steps=6)
    engine = _engine(sd_folder, "cuda")

    def cancel(request_id: str, event: object) -> None:
        if request_id == cancelled.id and isinstance(event, Progress) and event.step == 2:
            engine.cancel(cancelled)

    engine.run(kept, cancelled, on_event=cancel)
    assert cancelled.id not in engine.images
    alone = _engine(sd_folder, "cuda")
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
