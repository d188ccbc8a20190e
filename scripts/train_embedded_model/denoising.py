"""What the UNet learns: the velocity of noisy latents."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor

from .pipeline import new_scheduler
from .replay import Replay

CAPTION_DROPOUT = 0.1


class Share:
    """One thread's share of every batch: its own pictures and its own noise, the common UNet."""

    def __init__(self, unet: UNet2DConditionModel, replay: Replay):
        self.unet, self.replay = unet, replay
        self.alphas_cumprod = new_scheduler().alphas_cumprod
        self.no_prompt = replay.embed([""])

    def backward(self, size: int, height: int, width: int) -> Tensor:
        """Add this share's gradients to the UNet's and return its loss.

        The loss is the mean squared error of the predicted velocity (Salimans & Ho 2022, arXiv:2202.00512).
        """
        latents, prompt_embeds = self.replay.batch(size, height, width)
        generator = self.replay.generator
        prompt_embeds[torch.rand(size, generator=generator) < CAPTION_DROPOUT] = self.no_prompt
        timesteps = random_timesteps(size, height * width, generator)
        alpha_squared = self.alphas_cumprod[timesteps][:, None, None, None].to(latents)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        velocity = alpha * noise - sigma * latents
        noisy_latents = alpha * latents + sigma * noise
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
    shift = (area / 256) ** 0.25
    return (1000 * shift * spread / (1 + (shift - 1) * spread)).long().clamp(0, 999)
