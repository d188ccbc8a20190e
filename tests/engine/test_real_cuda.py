"""The engine on a real GPU: `python -m pytest -m gpu`. The other tests of CUDA run on the fake device."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

from hypergen.request import GenerationRequest
from tests.support.compare_devices import load_loras, make_engine, pixels
from tests.support.lora_files import ATTENTION, EVERYTHING, save_lora
from tests.support.small_models import save_flux, save_sd, save_sd3, save_sdxl
from tests.support.sync_engine import InlineEngine, make_request

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

_SAVE = {"sd": save_sd, "sdxl": save_sdxl, "flux": save_flux, "sd3": save_sd3}
_UNET_SAMPLERS = ("ddim", "euler", "euler_a", "dpmpp_2m_karras")
_SAMPLERS = {
    "sd": _UNET_SAMPLERS,
    "sdxl": _UNET_SAMPLERS,
    "flux": ("euler", "heun"),
    "sd3": ("euler", "heun"),
}

# Of pixels, in 255ths, from float32 on a CPU; half precision and other kernels round otherwise.
_MEAN_DIFFERENCE = 2


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("family", _SAVE)
def test_an_image_is_nearly_that_of_the_cpu_and_has_the_same_bytes_in_every_batch(
    tmp_path: Path, family: str, dtype: str
) -> None:
    folder = _SAVE[family](tmp_path / family)
    samplers = _SAMPLERS[family]
    batched, alone = (make_engine(folder, "cuda", dtype=dtype) for _ in range(2))
    with closing(batched.engine), closing(alone.engine):
        for engine in (batched, alone):
            engine.engine.warm_up()
        for first in (0, 6):  # CUDA graphs run from the second use on
            requests = [
                make_request(
                    seed=seed,
                    sampler=samplers[seed % len(samplers)],
                    num_inference_steps=3 + seed % 3,
                    guidance_scale=(1.0, 4.0)[seed % 2],
                )
                for seed in range(first, first + 6)
            ]
            _assert_same_bytes(folder, batched, alone, requests)


def _assert_same_bytes(
    folder: Path,
    batched: InlineEngine,
    alone: InlineEngine,
    requests: list[GenerationRequest],
    **settings: Any,
) -> None:
    cpu = make_engine(folder, "cpu", **settings)
    cpu.run(*requests)
    batched.generate(*requests)
    assert not batched.errors
    for request in requests:
        assert batched.images[request.id][0].shared_forwards
        alone.generate(request)
        assert alone.data(request) == batched.data(request), request
        assert np.abs(pixels(batched, request) - pixels(cpu, request)).mean() < _MEAN_DIFFERENCE, request


def test_loras_of_other_rows_do_not_change_an_image(sd_folder: Path, tmp_path: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    save_lora(tmp_path / "attention.safetensors", pipeline, rank=4, targets=ATTENTION, seed=1)
    for name, rank in (("everything", 8), ("another", 8), ("larger", 40), ("largest", 150)):
        save_lora(tmp_path / f"{name}.safetensors", pipeline, rank=rank, targets=EVERYTHING, seed=rank)
    rows: list[tuple[tuple[str, float], ...]] = [
        (),
        (("attention", 1.0),),
        (("everything", 0.7),),
        (("another", -0.5), ("attention", 0.3), ("everything", 0.5)),
        (("larger", 0.6),),
        (("largest", 0.5),),
        (("everything", 0.2), ("largest", -0.3)),
    ]
    settings = {"lora_dir": (tmp_path,)}
    batched, alone = (make_engine(sd_folder, "cuda", dtype="float16", **settings) for _ in range(2))
    loaded = load_loras(batched, "attention", "everything", "another", "larger", "largest")
    assert len(loaded) == 5
    with closing(batched.engine), closing(alone.engine):
        for engine in (batched, alone):
            engine.engine.warm_up()
        for seed in (0, 100):  # CUDA graphs run from the second use on
            requests = [make_request(seed=seed + i, loras=loras) for i, loras in enumerate(rows)]
            _assert_same_bytes(sd_folder, batched, alone, requests, **settings)
