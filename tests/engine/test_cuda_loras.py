"""LoRAs on the fake CUDA device: batches of them, the launches that they add, and products that overflow."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.engine.accelerator_step import AcceleratorStep
from hypergen.engine.compiled_forward import CompiledForward
from hypergen.models import loading
from tests.support.compare_devices import assert_close, load_loras, make_engine
from tests.support.fake_cuda import FakeCuda, fake_cuda
from tests.support.lora_files import ATTENTION, EVERYTHING, save_lora
from tests.support.sync_engine import InlineEngine, make_request, make_settings, prepare_image


@pytest.fixture
def device(lora_files: Path) -> Iterator[FakeCuda]:
    with fake_cuda() as device:
        yield device


@pytest.fixture(scope="module")
def lora_files(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # What libraries import at a first load must not see the fake device.
    loading.load(sd_folder, make_settings())
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    folder = tmp_path_factory.mktemp("loras")
    save_lora(folder / "attention.safetensors", pipeline, rank=4, targets=ATTENTION, seed=1)
    save_lora(folder / "everything.safetensors", pipeline, rank=8, targets=EVERYTHING, seed=2)
    save_lora(folder / "another.safetensors", pipeline, rank=8, targets=EVERYTHING, seed=4)
    save_lora(folder / "third.safetensors", pipeline, rank=8, targets=EVERYTHING, seed=5)
    save_lora(folder / "larger.safetensors", pipeline, rank=40, targets=EVERYTHING, seed=6)
    save_lora(folder / "largest.safetensors", pipeline, rank=150, targets=EVERYTHING, seed=7)
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
    (("larger", 0.6),),
    (("largest", 0.5),),
    (("everything", 0.2), ("largest", -0.3)),
]


def test_loras_of_other_rows_do_not_change_an_image(
    sd_folder: Path, device: FakeCuda, lora_files: Path
) -> None:
    requests = [
        make_request(seed=seed, loras=loras, num_inference_steps=2) for seed, loras in enumerate(_LORAS)
    ]
    batched = make_engine(sd_folder, "cuda", lora_dir=(lora_files,))
    batched.probe_shapes(requests[0])
    loaded = load_loras(batched, "attention", "everything", "another", "dora", "larger", "largest")
    batched.run(*requests)
    assert not batched.errors
    assert len(loaded) == 6
    cpu = make_engine(sd_folder, "cpu", lora_dir=(lora_files,))
    cpu.run(*requests)
    alone = make_engine(sd_folder, "cuda", lora_dir=(lora_files,))
    for request in requests:
        assert_close(batched, cpu, request)
        alone.generate(request)
        assert batched.images[request.id][0].shared_forwards
        assert alone.data(request) == batched.data(request), request.loras
    alone.engine.close()


_ONE, _OTHER, _THIRD = ("everything", 0.7), ("another", -0.5), ("third", 0.2)
_SMALL, _LARGER, _LARGEST = ("attention", 0.5), ("larger", 0.4), ("largest", 0.3)
# The LoRAs of each row, and the launches for each layer.
_LAUNCHES: dict[str, tuple[list[Any], int]] = {
    "one LoRA": ([(_ONE,)] * 4, 3),
    "a row without": ([(_ONE,)] * 3 + [()], 5),
    "two LoRAs": ([(_ONE,)] * 2 + [(_OTHER,)] * 2, 5),
    "three LoRAs": ([(_ONE,), (_OTHER,), (_THIRD,), ()], 5),
    "two in each row": ([(_ONE, _OTHER)] * 4, 5),
    "up to two in a row": ([(_ONE, _OTHER), (_OTHER, _THIRD), (_THIRD,), ()], 7),
    "up to four in a row": ([(_ONE, _OTHER, _THIRD, _SMALL)] + [(_THIRD,)] * 3, 7),
    "one of a larger rank": ([(_LARGER,)] * 4, 3),
    "two ranks": ([(_LARGER,), (_ONE,), (_OTHER, _THIRD), ()], 7),
    "two ranks in a row": ([(_LARGER, _ONE), (_LARGEST,), (_LARGEST, _THIRD), ()], 7),
}


@pytest.mark.parametrize(
    ("case", "compiles"), [*((case, False) for case in _LAUNCHES), ("one LoRA", True), ("two ranks", True)]
)
def test_launches_of_loras_for_each_layer(
    sd_folder: Path,
    device: FakeCuda,
    lora_files: Path,
    case: str,
    compiles: bool,
) -> None:
    rows, launches = _LAUNCHES[case]
    family = loading.load(sd_folder, make_settings(device="cuda", lora_dir=(lora_files,)))
    if compiles:
        CompiledForward(family)  # batches with LoRAs run eagerly
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
    assert any(weights.down.dim() > 2 for weights in layers)
    assert added == launches * len(layers)
    with torch.inference_mode():  # layers that have a hook, but no LoRA
        added = count([(_SMALL,)] * 4) - count([()] * 4)
    assert added == 3 * sum(name.endswith(ATTENTION) for name in lora.layers if name.startswith("unet"))
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
    alone = make_engine(sd_folder, "cuda", **settings)
    for request in requests[1:]:
        alone.generate(request)
        assert alone.data(request) == engine.data(request)
    alone.engine.close()
