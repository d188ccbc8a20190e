"""Compiled forward passes: only listed sizes, never at run time, with the same bytes in every batch.

Most tests compile without generating code, which takes minutes: torch.compile traces the network, keeps it by
shape and checks its guards, and then runs the traced operations.
"""

from __future__ import annotations

import gc
import itertools
import json
import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn
from torch._dynamo.utils import counters

from hypergen.engine.accelerator_step import AcceleratorStep
from hypergen.engine.batch_invariance.bucket_store import BucketStore
from hypergen.engine.model_loader import Loader
from hypergen.errors import SettingError
from hypergen.models import loading
from hypergen.request import ControlInput, GenerationRequest
from tests.conditioning.test_controlnet import random_controlnet
from tests.support.diffusers_edits import sample_image
from tests.support.lora_files import save_lora
from tests.support.random_models import RANDOM_MODELS
from tests.support.small_models import save_flux, save_sd3
from tests.support.sync_engine import InlineEngine, make_request, make_settings, served_model

_SAVE = {"flux": save_flux, "sd3": save_sd3}


def _save_minimal_sd(folder: Path) -> Path:
    """A Stable Diffusion whose UNet has few kernels to compile; native size 64x64."""
    unet = {
        "block_out_channels": (8,),
        "layers_per_block": 1,
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "mid_block_type": "UNetMidBlock2DCrossAttn",
        "norm_num_groups": 4,
        "attention_head_dim": 4,
    }
    replace(RANDOM_MODELS["tiny"], latent_side=8, unet=unet).pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def minimal_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _save_minimal_sd(tmp_path_factory.mktemp("compile") / "minimal")


@pytest.fixture(autouse=True)
def _nothing_compiled_yet() -> None:
    torch.compiler.reset()


@pytest.fixture(autouse=True)
def _original_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code shares the original weights, so on a CPU the eager images must have them too."""
    monkeypatch.setattr("hypergen.engine.reordered_weights.can_reorder", lambda _layer: False)


@pytest.fixture
def without_codegen(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_module: Callable[..., None] = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: compile_module(self, backend="eager", **kw))


def _clock() -> Callable[[], float]:
    """Every forward pass takes 10 ms."""
    readings = itertools.count()
    return lambda: 0.01 * next(readings)


def _engine(folder: Path, family: Any = None, **settings: Any) -> InlineEngine:
    """A warm engine on a clock by which rows are free: the bucket is the largest."""
    values = {"compile": "on", "max_batch_size": 4, **settings}
    family = family or loading.load(folder, make_settings(**values))
    engine = InlineEngine(family, clock=_clock(), **values)
    engine.engine.warm_up()
    return engine


def _eager(folder: Path, **settings: Any) -> InlineEngine:
    family = loading.load(folder, make_settings(**settings))
    return InlineEngine(family, clock=time.monotonic, **settings)


def _versions() -> int:
    return counters["stats"]["unique_graphs"]


def _requests(count: int = 4) -> list[GenerationRequest]:
    return [make_request(seed=seed, num_inference_steps=2 + seed) for seed in range(count)]


def _close(one: bytes, other: bytes, tolerance: float = 1e-3) -> bool:
    ours, theirs = (np.frombuffer(data, dtype=np.float32) for data in (one, other))
    return float(np.linalg.norm(ours - theirs)) <= tolerance * float(np.linalg.norm(theirs))


def _check(folder: Path) -> None:
    """A listed size is compiled once, has the same bytes in every batch, and nearly those of eager."""
    requests = _requests()
    before = _versions()
    engine = _engine(folder, compile_sizes="64x64")
    compiled = _versions()
    assert compiled > before
    others = [make_request(width=96), make_request(prompt="a long prompt " * 20)]
    engine.run(*requests, *others)
    assert not engine.errors
    assert _versions() == compiled
    assert engine.engine.status().determinism["64x64"] == "exact"
    alone = _engine(folder, compile_sizes="64x64")
    alone.run(requests[2])
    assert alone.data(requests[2]) == engine.data(requests[2])
    eager = _eager(folder)
    eager.run(requests[2], others[0])
    assert _close(engine.final_latents[requests[2].id], eager.final_latents[requests[2].id])
    assert engine.data(others[0]) == eager.data(others[0])


def test_a_unet_is_compiled_for_listed_sizes(minimal_folder: Path) -> None:
    """With generated code, and so with other bits than eager."""
    _check(minimal_folder)


@pytest.mark.usefixtures("without_codegen")
@pytest.mark.parametrize("name", _SAVE)
def test_a_transformer_is_compiled_for_listed_sizes(tmp_path: Path, name: str) -> None:
    _check(_SAVE[name](tmp_path))


@pytest.mark.usefixtures("without_codegen")
def test_repeated_blocks_are_compiled_instead_of_the_whole_transformer(tmp_path: Path) -> None:
    before = _versions()
    _engine(save_flux(tmp_path), compile_sizes="64x64,128x64")
    assert _versions() == before + 4  # two sizes of two kinds of blocks


@pytest.mark.usefixtures("without_codegen")
def test_all_batches_of_a_compiled_size_have_one_row_count(minimal_folder: Path) -> None:
    rows: list[int] = []
    engine = _engine(minimal_folder, compile_sizes="64x64", determinism="fast")
    forward: Any = engine.engine.family.forward

    def record(latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows.append(len(latents))
        return forward(latents, *args, **kwargs)

    engine.engine.family.forward = record  # pyright: ignore[reportAttributeAccessIssue]
    engine.run(*_requests(), make_request(guidance_scale=1.0))
    assert set(rows) == {8}
    assert engine.engine.status().row_counts == {"64x64": (8,)}


@pytest.mark.usefixtures("without_codegen")
def test_without_a_list_the_default_size_is_compiled(
    minimal_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        engine = _engine(minimal_folder)
        engine.run(make_request(width=128), make_request(width=128, prompt="a long prompt " * 20))
    assert "Compiled 64x64 for 8 rows" in caplog.text
    assert caplog.text.count("128x64 runs uncompiled") == 1  # once, although it has two prompt lengths


@pytest.mark.usefixtures("without_codegen")
def test_loras_and_controlnets_run_eagerly_and_share_no_batch_with_compiled_images(
    minimal_folder: Path, tmp_path: Path
) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(minimal_folder, safety_checker=None)
    save_lora(tmp_path / "style.safetensors", pipeline)
    random_controlnet(pipeline.components, 1).save_pretrained(tmp_path / "edges")
    settings = {"lora_dir": [str(tmp_path)], "controlnet": {"edges": str(tmp_path / "edges")}}
    control = ControlInput(model="edges", image=sample_image(seed=4))
    plain, styled, controlled = (
        make_request(num_inference_steps=8),  # of which the last run when layers have the hooks of a LoRA
        make_request(loras=(("style", 1.0),)),
        make_request(control=control),
    )
    engine = _engine(minimal_folder, **settings)
    versions = _versions()
    engine.run(plain, styled, controlled)
    assert not engine.errors
    assert _versions() == versions
    alone, eager = _engine(minimal_folder), _eager(minimal_folder, **settings)
    alone.run(plain)
    eager.run(styled, controlled)
    assert engine.data(plain) == alone.data(plain)
    assert engine.data(styled) == eager.data(styled)
    assert engine.data(controlled) == eager.data(controlled)


@pytest.mark.usefixtures("without_codegen")
def test_the_step_of_an_accelerator_runs_compiled_shapes(tmp_path: Path) -> None:
    """On the CPU, because the fake device has no compiler."""
    engine = _engine(save_flux(tmp_path), compile_sizes="64x64")
    family, runner = engine.engine.family, engine.engine._runner
    runner._accelerator = AcceleratorStep(family, graphs=False)
    tokens: set[int] = set()  # of images in eager forward passes; those of the default size have 4096
    family.denoiser.register_forward_pre_hook(
        lambda _module, _args, kwargs: tokens.add(kwargs["hidden_states"].shape[1]), with_kwargs=True
    )
    versions = _versions()
    engine.run(*_requests())
    assert not engine.errors
    assert tokens <= {4096}
    assert _versions() == versions


@pytest.mark.usefixtures("without_codegen")
def test_an_evicted_model_is_freed(tmp_path: Path) -> None:
    engine = _engine(save_flux(tmp_path), compile_sizes="64x64")
    denoiser = weakref.ref(engine.engine.family.denoiser)
    engine.engine.close()
    del engine
    gc.collect()
    assert denoiser() is None


@pytest.mark.usefixtures("without_codegen")
def test_out_of_memory_ends_compiled_batches_of_a_size(minimal_folder: Path) -> None:
    engine = _engine(minimal_folder)
    profiles = engine.engine.shape_profiles
    (key,) = profiles.costs
    versions = _versions()
    profiles.limit_rows(key, 8)
    assert engine.engine.status().row_counts == {"64x64": (4,)}
    engine.run(*_requests())
    assert not engine.errors
    assert _versions() == versions


@pytest.mark.usefixtures("without_codegen")
def test_buckets_of_compiled_sizes_outlive_the_process(minimal_folder: Path, tmp_path: Path) -> None:
    loader = Loader(lambda _id, _event: None, alone=True, state_folder=tmp_path)
    loader(served_model(minimal_folder, compile="on"), lambda: None)
    ((_, buckets),) = json.loads((tmp_path / "row_buckets.json").read_text()).items()
    (bucket,) = buckets.values()
    store = BucketStore(tmp_path / "other.json", {})
    store.put(next(iter(buckets)), 4)
    family = loading.load(minimal_folder, make_settings(compile="on"))
    engine = InlineEngine(family, clock=_clock(), buckets=store, compile="on")
    engine.engine.warm_up()
    assert engine.engine.status().row_counts == {"64x64": (4,)}
    assert bucket in (2, 4, 8, 16)


def test_a_failing_compiler_is_an_error_at_start(
    minimal_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no compiler")

    compile_module: Callable[..., None] = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **kw: compile_module(self, backend=fail, **kw))
    with pytest.raises(SettingError, match=r"compile on: torch.compile failed for 64x64: .*no compiler"):
        _engine(minimal_folder)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_images_on_cuda_are_nearly_the_eager_ones_and_the_same_in_every_batch(
    minimal_folder: Path,
) -> None:
    requests = _requests()
    engine = _engine(minimal_folder, device="cuda")
    versions = _versions()
    engine.run(*requests)
    assert not engine.errors
    assert _versions() == versions > 0
    alone, eager = _engine(minimal_folder, device="cuda"), _eager(minimal_folder, device="cuda")
    alone.run(requests[2])
    eager.run(requests[2])
    assert alone.data(requests[2]) == engine.data(requests[2])
    assert _close(engine.final_latents[requests[2].id], eager.final_latents[requests[2].id], 1e-2)
