"""The training loss of the UNet, which predicts the velocity of noisy latents."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false

import math

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from .pipeline import new_scheduler
from .replay import Replay, Sample
from .scenes import OPEN_POSITIONS

CAPTION_DROPOUT = 0.1
PURE_NOISE_SHARE, PURE_NOISE_TIMESTEP = 0.15, 999
BLENDED_SHARE = 0.5
# The velocity grows with the displacement by alpha^2 / sigma: 1.3 at this timestep, without limit below.
LEAST_BLENDED_TIMESTEP = 200
MIDDLE = OPEN_POSITIONS.index((0, 0))
# The quantile 1/n of chi-squared with two degrees of freedom: the middle is as likely as each corner.
MIDDLE_BELOW = -2 * math.log(1 - 1 / len(OPEN_POSITIONS))


class Share:
    """One thread's share of every batch: its own images and noise, and the common UNet."""

    def __init__(self, unet: UNet2DConditionModel, replay: Replay):
        self.unet, self.replay = unet, replay
        self.alphas_cumprod = new_scheduler().alphas_cumprod
        self.no_prompt = replay.embed([""])

    def loss(self, size: int, height: int, width: int, blend: float = 0.0, pure_noise: float = 0.0) -> Tensor:
        """The mean squared error of the predicted velocity (Salimans & Ho 2022, arXiv:2202.00512).

        If the caption leaves the object's position open, the noise determines it (`positions_from_noise`):
        noise and image are not sampled independently (Li et al. 2024, arXiv:2406.12303). So the first step of
        sampling decides the position, and no step predicts the mean of all positions.

        A share `pure_noise` of the noisy latents is noise alone at timestep 999, as in the first step of
        sampling. That step decides the position, but random timesteps hit 999 only once in 500 (256x256).
        Even there, the square root of alphas_cumprod is 0.015, so the image is still visible.

        With `blend`, about three in ten of the noisy latents of such objects are blended with the object in
        another position, up to that share; the velocity still leads to the right position. Sampling in few
        steps produces such latents, which training would never show otherwise (the exposure bias of Ning et
        al. 2023, arXiv:2301.11706).
        """
        samples = self.replay.batch(size, height, width)
        generator = self.replay.generator
        noise = torch.randn((size, 4, height, width), generator=generator).to(samples[0].latents)
        latents = torch.stack(list(map(latents_at, samples, positions_from_noise(noise))))
        elsewhere = torch.stack([random_row(sample.latents, generator) for sample in samples])
        prompt_embeds = torch.stack([sample.prompt_embeds for sample in samples]).float()
        prompt_embeds[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = self.no_prompt
        timesteps = random_timesteps(size, height * width, generator)
        is_pure_noise = torch.rand(size, generator=generator) < pure_noise
        timesteps[is_pure_noise] = PURE_NOISE_TIMESTEP
        is_blended = torch.rand(size, generator=generator) < BLENDED_SHARE
        is_blended &= ~is_pure_noise & (timesteps >= LEAST_BLENDED_TIMESTEP)
        shares = blend * torch.rand(size, generator=generator) * is_blended
        displacement = over_latents(shares).to(latents) * (elsewhere - latents)
        alpha_squared = over_latents(self.alphas_cumprod[timesteps]).to(latents)
        noisy_latents, velocity = add_noise(latents, displacement, noise, alpha_squared)
        noisy_latents = torch.where(over_latents(is_pure_noise).to(noise.device), noise, noisy_latents)
        velocity_pred = self.unet(noisy_latents, timesteps.to(latents.device), prompt_embeds).sample
        return torch.nn.functional.mse_loss(velocity_pred, velocity)


def add_noise(
    latents: Tensor, displacement: Tensor, noise: Tensor, alpha_squared: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents of `latents + displacement`, and the velocity that leads from them to `latents`.

    With alpha^2 + sigma^2 = 1, latents are alpha * noisy_latents - sigma * velocity.
    """
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    noisy_latents = alpha * (latents + displacement) + sigma * noise
    return noisy_latents, alpha * noise - sigma * latents + alpha_squared / sigma * displacement


def over_latents(values: Tensor) -> Tensor:
    """One value per image, shape (B, 1, 1, 1)."""
    return values[:, None, None, None]


def positions_from_noise(noise: Tensor) -> list[int]:
    """Indices in OPEN_POSITIONS that noise of shape (B, 4, H, W) determines; all are equally likely.

    The position is on the side, horizontally and vertically, where the first channel has the larger sum. If
    both differences are small, it is the middle. The rule is the same for all captions, so it is learnt once.
    The rule of Li et al., the latents nearest to the noise, differs per caption and was hardly learnt.
    """
    first = noise[:, 0]
    height, width = first.shape[1:]
    across = first[:, :, width // 2 :].sum((1, 2)) - first[:, :, : width // 2].sum((1, 2))
    down = first[:, height // 2 :].sum((1, 2)) - first[:, : height // 2].sum((1, 2))
    sides = torch.stack([across, down], 1) / math.sqrt(height * width)
    corners = [OPEN_POSITIONS.index((a, d)) for a, d in (2 * (sides > 0).int() - 1).tolist()]
    in_middle = (sides.square().sum(1) < MIDDLE_BELOW).tolist()
    return [MIDDLE if middle else corner for middle, corner in zip(in_middle, corners, strict=True)]


def latents_at(sample: Sample, position: int) -> Tensor:
    """The latents with the object in one of OPEN_POSITIONS; without an open position, the only ones."""
    return sample.latents[position] if len(sample.latents) > 1 else sample.latents[0]


def random_row(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (), generator=generator)]


def random_timesteps(count: int, area: int, generator: torch.Generator) -> Tensor:
    """Timesteps spread evenly over a batch, with more noisy ones for larger images.

    More latents of the same flat colour need more noise to hide it, and shapes and counts are decided while
    it is hidden (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).
    """
    order, offset = torch.randperm(count, generator=generator), torch.rand(count, generator=generator)
    spread = (order + offset) / count
    shift = (area / 64) ** 0.25
    return (1000 * shift * spread / (1 + (shift - 1) * spread)).long().clamp(0, 999)
