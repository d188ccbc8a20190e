"""Memory settings: VAE tiling, offload and quantization."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from torch import nn
from torch.nn import functional

from hypergen.config import EngineSettings
from hypergen.denoising.offload import ModelOffloader, device_of
from hypergen.engine.postprocess import to_pixels
from hypergen.errors import HyperGenError
from hypergen.model_store.setting_checks import check_device_settings
from hypergen.model_store.store import EMBEDDED_FOLDER
from hypergen.models import loading
from hypergen.models.memory import apply_memory_settings, enable_vae_tiling
from hypergen.models.sd import StableDiffusion
from tests.support.compare_with_diffusers import generate_one_at_a_time
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

_REQUEST = make_request(num_inference_steps=3, negative_prompt="blurred")
_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def _decode(vae: Any, latents: torch.Tensor) -> np.ndarray:
    return to_pixels(vae.decode(latents, return_dict=False)[0]).numpy().astype(int)


@torch.inference_mode()
def test_a_tiled_image_is_close_to_the_untiled_one() -> None:
    vae: Any = AutoencoderKL.from_pretrained(EMBEDDED_FOLDER / "vae")
    patches = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = functional.interpolate(patches, size=(192, 192), mode="bilinear")
    latents = vae.encode(image).latent_dist.mode()
    untiled = _decode(vae, latents)
    sides: set[int] = set()
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, inputs: sides.update(inputs[0].shape[-2:]))
    enable_vae_tiling(vae, 96)
    tiled, tiled_latents = _decode(vae, latents), vae.encode(image).latent_dist.mode()
    # Tiles at the edges are halves.
    assert sides == {96, 48, 96 * latents.shape[-1] // 192, 48 * latents.shape[-1] // 192}
    assert 0 < np.abs(tiled - untiled).mean() < untiled.std() / 10
    assert (tiled_latents - latents).abs().mean() < latents.std() / 5


def test_tiling_applies_to_images_larger_than_a_tile(sd_folder: Path) -> None:
    plain = loading.load(sd_folder, make_settings())
    tiled = loading.load(sd_folder, make_settings(vae_tiling="on"))
    wide = replace(_REQUEST, width=640, num_inference_steps=1)
    assert (generate_alone(tiled, _REQUEST) == generate_alone(plain, _REQUEST)).all()
    assert (generate_alone(tiled, wide) != generate_alone(plain, wide)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "model"}, "offload needs a CUDA device.* runs on cpu"),
        pytest.param(
            {"quantization": "int8"},
            "quantization int8 needs the package torchao: pip install 'torchao>=0.18', or in",
            marks=pytest.mark.skipif(
                importlib.util.find_spec("torchao") is not None, reason="torchao is installed"
            ),
        ),
    ],
)
def test_unsupported_memory_settings_are_errors_at_startup(
    sd_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(HyperGenError, match=message):
        loading.load(sd_folder, make_settings(**settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"offload": "model"}, "offload needs a CUDA device.* runs on mps"),
        ({"compile": "on"}, "compile needs a CUDA device or a CPU.* runs on mps"),
        ({"quantization": "fp8"}, "quantization fp8 needs .* mps has no float8; use int8"),
    ],
)
def test_unsupported_settings_on_mps_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(HyperGenError, match=message):
        check_device_settings(make_settings(**settings), "mps")
    check_device_settings(make_settings(**settings), "cuda")


@pytest.mark.parametrize(("has_bfloat16", "chosen"), [(True, torch.bfloat16), (False, torch.float16)])
def test_gpus_that_emulate_bfloat16_get_float16(
    monkeypatch: pytest.MonkeyPatch, has_bfloat16: bool, chosen: torch.dtype
) -> None:
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda *, including_emulation: has_bfloat16 or including_emulation
    )
    device = torch.device("cuda", 0)
    assert loading.choose_dtype(make_settings(dtype=None), device, {}, torch.bfloat16) == chosen
    given = make_settings(dtype="bfloat16")
    assert loading.choose_dtype(given, device, {}, torch.bfloat16) == torch.bfloat16


@pytest.mark.usefixtures("offload_small_networks")
def test_offload_keeps_one_network_on_the_device_and_the_bytes(sd_folder: Path) -> None:
    """On a CPU: records which network is loaded."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    offloader = ModelOffloader(torch.device("cpu"))
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    loaded: list[str] = []

    def record(name: str) -> None:
        assert offloader._loaded is networks[name]
        if loaded[-1:] != [name]:
            loaded.append(name)

    for name, network in networks.items():
        offloader.register(network)
        layer: Any = network.decoder if name == "vae" else next(network.children())
        layer.register_forward_pre_hook(lambda *_, name=name: record(name))
    family = StableDiffusion(pipeline, {}, make_settings())
    loaded.clear()
    plain = loading.load(sd_folder, make_settings())
    assert (generate_alone(family, _REQUEST) == generate_alone(plain, _REQUEST)).all()
    assert loaded == ["text_encoder", "unet", "vae"]
    assert device_of(pipeline.unet) == torch.device("cpu")


@pytest.mark.usefixtures("offload_small_networks")
@torch.inference_mode()
def test_a_network_is_moved_to_the_device_for_its_forward() -> None:
    with torch.inference_mode(False):
        network = nn.Linear(4, 4)
    offloader = ModelOffloader(torch.device("meta"))
    offloader.register(network)
    assert network.weight.device.type == "cpu"
    assert device_of(network).type == "meta"
    assert network(torch.ones(1, 4)).device.type == "meta"
    assert network.weight.device.type == "meta"
    assert not network.weight.is_inference()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.usefixtures("offload_small_networks")
def test_offloaded_models_give_the_same_bytes(sd_folder: Path) -> None:
    images: list[np.ndarray] = []
    for offload in ("off", "model"):
        settings = EngineSettings.model_validate({"device": "cuda", "dtype": "float32", "offload": offload})
        family: Any = loading.load(sd_folder, settings)
        images.append(generate_alone(family, _REQUEST))
        assert family.denoiser.device.type == ("cuda" if offload == "off" else "cpu")
        assert family.model_info("").device == "cuda"
    assert (images[0] == images[1]).all()


@_TORCHAO
@pytest.mark.usefixtures("offload_small_networks")
@pytest.mark.filterwarnings("ignore")  # torchao warns at its import
@pytest.mark.parametrize("mode", ["int8", "fp8"])
def test_quantized_models_are_close_to_the_original_and_batch_invariant(sd_folder: Path, mode: Any) -> None:
    plain = loading.load(sd_folder, make_settings())
    small: Any = loading.load(sd_folder, make_settings(quantization=mode))
    layers = [layer for layer in small.denoiser.modules() if isinstance(layer, nn.Linear)]
    assert not any(type(layer.weight) in (torch.Tensor, nn.Parameter) for layer in layers)
    difference = np.abs(generate_alone(small, _REQUEST).astype(int) - generate_alone(plain, _REQUEST))
    assert 0 < difference.mean() < 5
    requests = [_REQUEST, replace(_REQUEST, id="other", seed=3, guidance_scale=1.0)]
    alone, batched = generate_one_at_a_time(small, requests), InlineEngine(small)
    batched.probe_shapes(*requests)
    batched.run(*requests)
    for request in requests:
        assert batched.data(request) == alone.data(request)
        assert batched.images[request.id][0].shared_forwards > 0
    offloader = ModelOffloader(torch.device("meta"))
    offloader.register(small.denoiser)
    with torch.inference_mode():
        offloader.load(small.denoiser)
    assert {parameter.device.type for parameter in small.denoiser.parameters()} == {"meta"}


def test_default_settings_change_nothing(sd_folder: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    placed = apply_memory_settings(pipeline, make_settings(), torch.device("cpu"))
    assert "decode" not in vars(placed.vae)
    assert not placed.vae.use_tiling
    assert not hasattr(placed.unet, "_hf_hook")
