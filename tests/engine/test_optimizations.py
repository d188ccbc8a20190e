"""Optimization settings: images stay the same up to rounding, unsupported settings are errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hypergen.engine.optimizations import bucket_size
from hypergen.errors import ModelError
from hypergen.models import loading
from hypergen.request import GenerationRequest
from tests.support.small_models import save_flux
from tests.support.sync_engine import InlineEngine, make_request, make_settings


def _engine(folder: Path, **settings: Any) -> InlineEngine:
    """An engine with a model of its own, because these settings change the model."""
    return InlineEngine(loading.load(folder, make_settings()), **settings)


def _latents(engine: InlineEngine, requests: list[GenerationRequest]) -> list[np.ndarray]:
    engine.run(*requests)
    assert engine.errors == {}
    return [np.frombuffer(engine.final_latents[request.id], dtype=np.float32) for request in requests]


def _requests() -> list[GenerationRequest]:
    return [
        make_request(seed=seed, num_inference_steps=steps, guidance_scale=guidance_scale, sampler=sampler)
        for seed, (steps, guidance_scale, sampler) in enumerate(
            [(4, 5.0, "euler"), (3, 1.0, "ddim"), (5, 3.0, "dpmpp_2m")]
        )
    ]


@pytest.mark.parametrize(
    "settings", [{"channels_last": True}, {"attention": "math"}, {"attention": "flash"}], ids=str
)
def test_images_stay_the_same_up_to_rounding(sd_folder: Path, settings: dict[str, Any]) -> None:
    plain = _latents(_engine(sd_folder), _requests())
    optimized = _latents(_engine(sd_folder, **settings), _requests())
    for one, other in zip(plain, optimized, strict=True):
        assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(one)


def test_channels_last_reaches_the_weights(sd_folder: Path) -> None:
    engine = _engine(sd_folder, channels_last=True).engine
    weights = [p for p in engine.family.denoiser.parameters() if p.dim() == 4 and p.shape[2] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in weights)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attention": "cudnn"}, "Attention 'cudnn' is not supported for this model on cpu"),
    ],
)
def test_settings_that_a_cpu_does_not_support_are_errors(
    sd_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        _engine(sd_folder, **settings).engine.warm_up()


def test_compiled_batches_are_padded_to_few_sizes() -> None:
    assert [bucket_size(rows) for rows in (1, 2, 3, 4, 5, 8, 9, 16)] == [2, 2, 4, 4, 8, 8, 16, 16]
    assert [bucket_size(rows, min_rows=1) for rows in (1, 2, 3)] == [1, 2, 4]


def test_a_compiled_model_runs_padded_batches(sd_folder: Path) -> None:
    """Compiled modules run eagerly here, because compilation takes minutes."""
    with torch.compiler.set_stance("force_eager"):
        engine = _engine(sd_folder, compile="on", max_batch_size=4)
        rows: list[int] = []
        denoiser = engine.engine.family.denoiser
        denoiser.register_forward_pre_hook(lambda _module, inputs: rows.append(inputs[0].shape[0]))
        compiled = _latents(engine, _requests())
    assert set(rows) <= {2, 4, 8}
    for one, other in zip(_latents(_engine(sd_folder), _requests()), compiled, strict=True):
        assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(one)


def test_a_transformer_is_compiled_by_block_and_runs_one_image_in_one_row(tmp_path: Path) -> None:
    folder = save_flux(tmp_path)
    requests = [make_request(seed=1), make_request(seed=2, num_inference_steps=3), make_request(seed=3)]
    plain = _latents(_engine(folder), requests)
    with torch.compiler.set_stance("force_eager"):
        engine = _engine(folder, compile="on", max_batch_size=4)
        denoiser: Any = engine.engine.family.denoiser
        compiled = {type(m).__name__ for m in denoiser.modules() if m._compiled_call_impl is not None}
        rows: list[int] = []
        denoiser.register_forward_pre_hook(
            lambda _module, _inputs, kwargs: rows.append(kwargs["hidden_states"].shape[0]), with_kwargs=True
        )
        engine.probe_shapes(requests[0])
        assert {1, 2} <= set(rows) <= {1, 2, 4, 8}
        rows.clear()
        (alone,) = _latents(engine, requests[:1])
        assert set(rows) == {1}
        batched = _latents(_engine(folder, compile="on", max_batch_size=4), requests)
    assert compiled == {"FluxTransformerBlock", "FluxSingleTransformerBlock"}
    for one, other in zip([plain[0], *plain], [alone, *batched], strict=True):
        assert np.linalg.norm(one - other) <= 1e-3 * np.linalg.norm(one)


@pytest.mark.bench
def test_a_compiled_model_generates(sd_folder: Path) -> None:
    compiled = _latents(_engine(sd_folder, compile="on", max_batch_size=1), _requests()[:1])
    (plain,) = _latents(_engine(sd_folder), _requests()[:1])
    assert np.linalg.norm(plain - compiled[0]) <= 1e-3 * np.linalg.norm(plain)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_compiled_images_stay_the_same_up_to_rounding_on_cuda(sd_folder: Path) -> None:
    def generate(**changes: Any) -> list[np.ndarray]:
        family = loading.load(sd_folder, make_settings(device="cuda"))
        engine = InlineEngine(family, device="cuda", **changes)
        requests = _requests()
        return _latents(engine, requests)

    compiled = generate(compile="on", max_batch_size=1)
    for one, other in zip(generate(), compiled, strict=True):
        assert np.linalg.norm(one - other) <= 1e-2 * np.linalg.norm(one)
