"""The latent space of a VAE: precision of the encoder, and its cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from hypergen.conditioning.latent_space import LatentSpace


@pytest.fixture
def vae(parts: dict[str, Any]) -> Any:
    vae: Any = AutoencoderKL.from_config(parts["vae"].config)
    return vae.eval()


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@torch.inference_mode()
def test_upcast_encodes_in_float32_and_restores_the_dtype(vae: Any) -> None:
    image = torch.rand(1, 3, 64, 64) * 2 - 1
    exact = LatentSpace(vae, torch.float32).encode(image, _generator())
    vae.to(torch.bfloat16)
    rough = LatentSpace(vae, torch.bfloat16).encode(image, _generator())
    dtypes: list[torch.dtype] = []
    hook = vae.encoder.register_forward_pre_hook(lambda _, inputs: dtypes.append(inputs[0].dtype))
    upcast = LatentSpace(vae, torch.bfloat16, upcast=True).encode(image, _generator())
    hook.remove()
    assert dtypes == [torch.float32]
    assert vae.dtype == upcast.dtype == rough.dtype == torch.bfloat16
    assert (upcast - exact).abs().max() < 0.1 * exact.std()


@torch.inference_mode()
def test_an_image_is_encoded_once_and_sampled_for_each_request(vae: Any) -> None:
    calls: list[int] = []
    vae.encoder.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    space, generator = LatentSpace(vae, torch.float32), _generator()
    images = [torch.full((1, 3, 64, 64), value / 10) for value in range(10)]
    first, second = (space.encode(images[0], generator) for _ in range(2))
    assert calls == [1]
    assert not torch.equal(first, second)
    for image in images[1:]:  # more images than the cache holds
        space.encode(image, generator)
    assert torch.equal(space.encode(images[0], _generator()), first)
    assert len(calls) == 11
