"""What the UNet learns: the velocity of noisy latents."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false

import math

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from .pipeline import new_scheduler
from .replay import Replay, Sample
from .scenes import OPEN_PLACES

CAPTION_DROPOUT = 0.1
PURE_NOISE_SHARE, PURE_NOISE_TIMESTEP = 0.15, 999
BLENDED_SHARE = 0.5
# The velocity grows with what strayed by alpha^2 / sigma: 1.3 here, and without end below.
LEAST_BLENDED_TIMESTEP = 200
MIDDLE = OPEN_PLACES.index((0, 0))
# The quantile 1/n of chi-squared with two degrees of freedom: the middle is as likely as each corner.
MIDDLE_BELOW = -2 * math.log(1 - 1 / len(OPEN_PLACES))


class Share:
    """One thread's share of every batch: its own pictures and its own noise, the common UNet."""

    def __init__(self, unet: UNet2DConditionModel, replay: Replay):
        self.unet, self.replay = unet, replay
        self.alphas_cumprod = new_scheduler().alphas_cumprod
        self.no_prompt = replay.embed([""])

    def loss(self, size: int, height: int, width: int, blend: float = 0.0, pure_noise: float = 0.0) -> Tensor:
        """The mean squared error of the predicted velocity (Salimans & Ho 2022, arXiv:2202.00512).

        Where a caption leaves the place of its object open, the noise decides (`places_told_by`): noise and
        picture are not drawn independently (Li et al. 2024, arXiv:2406.12303), so that the place is settled
        in the first step of sampling, and no step has to lead to the mean of all places.

        A share of `pure_noise` of the noisy latents is noise alone at timestep 999, as sampling starts. That
        step decides the place, but random timesteps hit 999 once in 500 (256x256), and even there the square
        root of alphas_cumprod, 0.015, lets the picture shine through.

        With `blend`, some three in ten of the noisy latents of such objects also hold up to that share of
        the object in another place; the target leads from there to the right one. Sampling in few steps
        passes through such latents, and without this, training never shows them (the exposure bias of
        Ning et al. 2023, arXiv:2301.11706).
        """
        samples = self.replay.batch(size, height, width)
        generator = self.replay.generator
        noise = torch.randn((size, 4, height, width), generator=generator).to(samples[0].latents)
        latents = torch.stack(list(map(latents_at, samples, places_told_by(noise))))
        elsewhere = torch.stack([random_row(sample.latents, generator) for sample in samples])
        prompt_embeds = torch.stack([sample.prompt_embeds for sample in samples]).float()
        prompt_embeds[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = self.no_prompt
        timesteps = random_timesteps(size, height * width, generator)
        is_pure_noise = torch.rand(size, generator=generator) < pure_noise
        timesteps[is_pure_noise] = PURE_NOISE_TIMESTEP
        is_blended = torch.rand(size, generator=generator) < BLENDED_SHARE
        is_blended &= ~is_pure_noise & (timesteps >= LEAST_BLENDED_TIMESTEP)
        shares = blend * torch.rand(size, generator=generator) * is_blended
        strayed = over_latents(shares).to(latents) * (elsewhere - latents)
        alpha_squared = over_latents(self.alphas_cumprod[timesteps]).to(latents)
        noisy_latents, velocity = add_noise(latents, strayed, noise, alpha_squared)
        noisy_latents = torch.where(over_latents(is_pure_noise).to(noise.device), noise, noisy_latents)
        velocity_pred = self.unet(noisy_latents, timesteps.to(latents.device), prompt_embeds).sample
        return torch.nn.functional.mse_loss(velocity_pred, velocity)


def add_noise(
    latents: Tensor, strayed: Tensor, noise: Tensor, alpha_squared: Tensor
) -> tuple[Tensor, Tensor]:
    """Noisy latents around `latents + strayed`, and the velocity that leads from there to `latents`.

    With alpha^2 + sigma^2 = 1, latents are alpha * noisy_latents - sigma * velocity.
    """
    alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
    noisy_latents = alpha * (latents + strayed) + sigma * noise
    return noisy_latents, alpha * noise - sigma * latents + alpha_squared / sigma * strayed


def over_latents(values: Tensor) -> Tensor:
    """One value a picture, shape (B, 1, 1, 1)."""
    return values[:, None, None, None]


def places_told_by(noise: Tensor) -> list[int]:
    """The indices in OPEN_PLACES of the places that noises, (B, 4, H, W), stand for; all are as likely.

    Left or right and up or down are where more of the first channel is, and it is the middle where both
    differ little. The rule is the same for all captions, so that it is learnt once. That of Li et al., the
    latents that are nearest to the noise, is another one for each caption, and was hardly learnt.
    """
    first = noise[:, 0]
    height, width = first.shape[1:]
    across = first[:, :, width // 2 :].sum((1, 2)) - first[:, :, : width // 2].sum((1, 2))
    down = first[:, height // 2 :].sum((1, 2)) - first[:, : height // 2].sum((1, 2))
    sides = torch.stack([across, down], 1) / math.sqrt(height * width)
    corners = [OPEN_PLACES.index((a, d)) for a, d in (2 * (sides > 0).int() - 1).tolist()]
    in_middle = (sides.square().sum(1) < MIDDLE_BELOW).tolist()
    return [MIDDLE if middle else corner for middle, corner in zip(in_middle, corners, strict=True)]


def latents_at(sample: Sample, place: int) -> Tensor:
    """The latents with the object in one of OPEN_PLACES; where its place is not open, there is no choice."""
    return sample.latents[place] if len(sample.latents) > 1 else sample.latents[0]


def random_row(rows: Tensor, generator: torch.Generator) -> Tensor:
    return rows[torch.randint(len(rows), (), generator=generator)]


def random_timesteps(count: int, area: int, generator: torch.Generator) -> Tensor:
    """Timesteps spread evenly over a batch; for larger pictures, more of the noisy ones.

    The more latents show the same flat colour, the more noise it takes to hide it, and shapes and counts are
    decided while it is hidden (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).
    """
    order, offset = torch.randperm(count, generator=generator), torch.rand(count, generator=generator)
    spread = (order + offset) / count
    shift = (area / 64) ** 0.25
    return (1000 * shift * spread / (1 + (shift - 1) * spread)).long().clamp(0, 999)
