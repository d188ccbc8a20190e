"""What the UNet learns: the velocity of noisy latents."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from .pipeline import new_scheduler
from .replay import Replay

CAPTION_DROPOUT = 0.1
BLENDED_SHARE = 0.5
# The velocity grows with what strayed by alpha^2 / sigma: 1.3 here, and without end below.
LEAST_BLENDED_TIMESTEP = 200


class Share:
    """One thread's share of every batch: its own pictures and its own noise, the common UNet."""

    def __init__(self, unet: UNet2DConditionModel, replay: Replay):
        self.unet, self.replay = unet, replay
        self.alphas_cumprod = new_scheduler().alphas_cumprod
        self.no_prompt = replay.embed([""])

    def backward(self, size: int, height: int, width: int, blend: float = 0.0) -> Tensor:
        """Add this share's gradients to the UNet's and return its loss.

        The loss is the mean squared error of the predicted velocity (Salimans & Ho 2022, arXiv:2202.00512).

        With `blend`, half of the noisy latents of objects that may stand elsewhere hold up to that share of
        them elsewhere, and the velocity leads away from it. Steps of sampling begin from the mean of what
        a caption may show, so they come by such latents, and training by itself never does; the fewer the
        steps, the more often two places stay (the exposure bias of Ning et al. 2023, arXiv:2301.11706).
        """
        sample = self.replay.batch(size, height, width)
        latents, prompt_embeds = sample.latents, sample.prompt_embeds
        generator = self.replay.generator
        prompt_embeds[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = self.no_prompt
        timesteps = random_timesteps(size, height * width, generator)
        alpha_squared = self.alphas_cumprod[timesteps][:, None, None, None].to(latents)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        is_blended = torch.rand(size, generator=generator) < BLENDED_SHARE
        is_blended &= timesteps >= LEAST_BLENDED_TIMESTEP
        shares = blend * torch.rand(size, generator=generator) * is_blended
        strayed = shares[:, None, None, None].to(latents) * (sample.elsewhere - latents)
        noisy_latents = alpha * (latents + strayed) + sigma * noise
        velocity = alpha * noise - sigma * latents + alpha_squared / sigma * strayed
        velocity_pred = self.unet(noisy_latents, timesteps.to(latents.device), prompt_embeds).sample
        loss = torch.nn.functional.mse_loss(velocity_pred, velocity)
        loss.backward()
        return loss.detach()


def random_timesteps(count: int, area: int, generator: torch.Generator) -> Tensor:
    """Timesteps spread evenly over a batch; for larger pictures, more of the noisy ones.

    The more latents show the same flat colour, the more noise it takes to hide it, and shapes and counts are
    decided while it is hidden (Esser et al. 2024, arXiv:2403.03206, section 5.3.2).
    """
    order, offset = torch.randperm(count, generator=generator), torch.rand(count, generator=generator)
    spread = (order + offset) / count
    shift = (area / 64) ** 0.25
    return (1000 * shift * spread / (1 + (shift - 1) * spread)).long().clamp(0, 999)
