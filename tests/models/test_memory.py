"""What makes a model fit into little memory: tiles, offloader on the device, 8-bit weights."""

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
from hypergen.errors import ModelError
from hypergen.model_store.store import EMBEDDED_FOLDER
from hypergen.models import loading
from hypergen.models.memory import apply_memory_settings, enable_vae_tiling, pixels_that_fit
from hypergen.models.sd import StableDiffusion
from tests.support.compare_with_diffusers import generate_one_at_a_time
from tests.support.sync_engine import InlineEngine, generate_alone, make_request, make_settings

_REQUEST = make_request(num_inference_steps=3, negative_prompt="blurred")
_TORCHAO = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


def _decode(vae: Any, latents: torch.Tensor) -> np.ndarray:
    return to_pixels(vae.decode(latents, return_dict=False)[0]).numpy().astype(int)


@torch.inference_mode()
def test_a_picture_of_tiles_is_nearly_the_whole_one() -> None:
    vae: Any = AutoencoderKL.from_pretrained(EMBEDDED_FOLDER / "vae")
    patches = torch.rand(1, 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = functional.interpolate(patches, size=(192, 192), mode="bilinear")
    latents = vae.encode(image).latent_dist.mode()
    whole = _decode(vae, latents)
    sides: set[int] = set()
    for part in (vae.encoder, vae.decoder):
        part.register_forward_pre_hook(lambda _, inputs: sides.update(inputs[0].shape[-2:]))
    enable_vae_tiling(vae, 96)
    tiled, tiled_latents = _decode(vae, latents), vae.encode(image).latent_dist.mode()
    # Those at the edges are halves.
    assert sides == {96, 48, 96 * latents.shape[-1] // 192, 48 * latents.shape[-1] // 192}
    assert 0 < np.abs(tiled - whole).mean() < whole.std() / 10
    assert (tiled_latents - latents).abs().mean() < latents.std() / 5


@torch.inference_mode()
def test_pictures_that_fit_are_not_cut_into_tiles(sd_folder: Path) -> None:
    loaded: list[Any] = [AutoencoderKL.from_pretrained(sd_folder / "vae") for _ in range(2)]
    vae, other = loaded
    latents = torch.randn(1, 4, 16, 12, generator=torch.Generator().manual_seed(0))
    whole = _decode(vae, latents)
    each = 1e9 / pixels_that_fit(vae, 1e9)
    enable_vae_tiling(vae, 64, each * 128 * 96 * 1.01)
    assert (_decode(vae, latents) == whole).all()
    enable_vae_tiling(other, 64, each * 128 * 96 * 0.99)
    assert (_decode(other, latents) != whole).any()


def test_what_fits_depends_on_the_memory_and_the_precision(sd_folder: Path) -> None:
    vae: Any = AutoencoderKL.from_pretrained(sd_folder / "vae")
    assert pixels_that_fit(vae, 2e9) == 2 * pixels_that_fit(vae, 1e9) > 0
    assert pixels_that_fit(vae.to(torch.bfloat16), 1e9) == 2 * pixels_that_fit(vae.to(torch.float32), 1e9)
    assert pixels_that_fit(vae, -1.0) == 0


def test_tiling_is_switched_on_for_pictures_beyond_a_tile(sd_folder: Path) -> None:
    plain = loading.load(sd_folder, make_settings())
    tiled = loading.load(sd_folder, make_settings(vae_tiling="on"))
    wide = replace(_REQUEST, width=640, num_inference_steps=1)
    assert (generate_alone(tiled, _REQUEST) == generate_alone(plain, _REQUEST)).all()
    assert (generate_alone(tiled, wide) != generate_alone(plain, wide)).any()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vae_tiling": "auto"}, "reads the memory of a CUDA device"),
        ({"offload": "model"}, "offload moves models to an accelerator"),
        pytest.param(
            {"quantization": "int8"},
            "quantization=int8 needs torchao",
            marks=pytest.mark.skipif(importlib.util.find_spec("torchao") is not None, reason="it is there"),
        ),
    ],
)
def test_what_cannot_work_here_is_refused_at_the_start(
    sd_folder: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        loading.load(sd_folder, make_settings(**settings))


def test_networks_take_turns_and_draw_the_same(sd_folder: Path) -> None:
    """The device is the CPU, so that only who is there can be seen, and not where."""
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    offloader = ModelOffloader(torch.device("cpu"))
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    there: list[str] = []

    def note(name: str) -> None:
        assert offloader._loaded is networks[name]
        if there[-1:] != [name]:
            there.append(name)

    for name, network in networks.items():
        offloader.register(network)
        inside: Any = network.decoder if name == "vae" else next(network.children())
        inside.register_forward_pre_hook(lambda *_, name=name: note(name))
    family = StableDiffusion(pipeline, {}, make_settings())
    there.clear()
    plain = loading.load(sd_folder, make_settings())
    assert (generate_alone(family, _REQUEST) == generate_alone(plain, _REQUEST)).all()
    assert there == ["text_encoder", "unet", "vae"]
    assert device_of(pipeline.unet) == torch.device("cpu")


@torch.inference_mode()
def test_a_network_is_brought_to_the_device_and_stays_what_it_is() -> None:
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
def test_offloaded_models_wait_in_memory_and_draw_the_same(sd_folder: Path) -> None:
    drawn: list[np.ndarray] = []
    for offload in ("off", "model"):
        settings = EngineSettings.model_validate({"device": "cuda", "dtype": "float32", "offload": offload})
        family: Any = loading.load(sd_folder, settings)
        drawn.append(generate_alone(family, _REQUEST))
        assert family.unet.device.type == ("cuda" if offload == "off" else "cpu")
        assert family.model_info("").device == "cuda"
    assert (drawn[0] == drawn[1]).all()


@_TORCHAO
@pytest.mark.filterwarnings("ignore")  # what torchao says at its import
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_weights_of_8_bits_draw_nearly_the_same_and_keep_their_promise(sd_folder: Path, kind: Any) -> None:
    plain = loading.load(sd_folder, make_settings())
    small: Any = loading.load(sd_folder, make_settings(quantization=kind))
    layers = [layer for layer in small.unet.modules() if isinstance(layer, nn.Linear)]
    assert not any(type(layer.weight) in (torch.Tensor, nn.Parameter) for layer in layers)
    difference = np.abs(generate_alone(small, _REQUEST).astype(int) - generate_alone(plain, _REQUEST))
    assert 0 < difference.mean() < 5
    requests = [_REQUEST, replace(_REQUEST, id="other", seed=3, guidance_scale=1.0)]
    lone, crowd = generate_one_at_a_time(small, requests), InlineEngine(small)
    crowd.probe_shapes(*requests)
    crowd.run(*requests)
    for request in requests:
        assert crowd.data(request) == lone.data(request)
        assert crowd.images[request.id][0].shared_forwards > 0
    offloader = ModelOffloader(torch.device("meta"))
    offloader.register(small.unet)
    with torch.inference_mode():
        offloader.load(small.unet)
    assert {parameter.device.type for parameter in small.unet.parameters()} == {"meta"}


def test_nothing_is_changed_unless_asked_for(sd_folder: Path) -> None:
    pipeline: Any = StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    placed = apply_memory_settings(pipeline, make_settings(), torch.device("cpu"))
    assert "decode" not in vars(placed.vae)
    assert not placed.vae.use_tiling
    assert not hasattr(placed.unet, "_hf_hook")
