"""Train the VAE: 8x8 pixels per latent, four latent channels."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOptionalCall=false
# pyright: reportOptionalMemberAccess=false, reportOptionalSubscript=false

import math
import random
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from torch.nn import functional

from .muon import muon_and_adamw, set_learning_rates
from .progress import Run, image_grid, rising_then_falling
from .render import render
from .scenes import Scene, random_scene
from .threads import step_together
from .thumbnails import start_as_thumbnails

SEED = 1
CROP = 64
CROPS = 12
LATENT_NOISE = 0.05  # makes the decoder robust against the UNet's errors
POSTERIOR_STD = 0.03


def train_vae(folder: Path, steps: int, device: str, threads: int) -> None:
    """Train, whiten and save the VAE in `folder`."""
    torch.manual_seed(SEED)
    vae = new_vae().to(device)
    workers = ThreadPoolExecutor(threads)
    # Layers at pixels or latents have columns of very different norms, which Muon would make equal.
    optimizers = muon_and_adamw(vae, 7e-4, 2e-3, except_for=("conv_in", "conv_out", "quant"), workers=workers)
    run = Run(folder, steps, {"vae": vae, "muon": optimizers[0], "adamw": optimizers[1]})
    rng = random.Random(SEED + run.step)
    shares = [Share(vae, rng.getrandbits(32), CROPS // threads) for _ in range(threads)]
    torch.set_num_threads(1)
    with workers:
        for step in run:
            set_learning_rates(optimizers, rising_then_falling(step, steps, warmup=30, flat=0.3))
            size = rng.choice((96, 128, 160, 256))
            compute_losses = [partial(share.loss, size) for share in shares]
            run.report(step_together(workers, compute_losses, vae, optimizers, max_norm=1.0))
    torch.set_num_threads(threads)
    vae.eval().requires_grad_(False)
    whiten(vae, render([random_scene(rng) for _ in range(128)], 128, 128).to(device))
    vae.save_pretrained(folder / "vae")
    for size in (128, 256):
        images = render([random_scene(rng) for _ in range(32)], size, size).to(device)
        decoded = vae.decode(vae.encode(images).latent_dist.mode()).sample.clamp(-1, 1)
        print(f"{size}x{size}: {psnr(images, decoded):.1f} dB")
        pairs = torch.stack([images, decoded], dim=1).flatten(0, 1)[:32]
        image_grid(pairs.cpu(), 8).save(folder / f"reconstructions_{size}.png")


def new_vae() -> AutoencoderKL:
    """A narrow Stable Diffusion VAE without attention, initialized by `start_as_thumbnails`."""
    vae = AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 24, 48, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,
        sample_size=256,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    )
    start_as_thumbnails(vae)
    return vae


class Share:
    """One thread's share of every batch: its own crops and noise, and the common VAE."""

    def __init__(self, vae: AutoencoderKL, seed: int, crops: int):
        self.vae, self.crops = vae, crops
        self.rng, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)

    def loss(self, size: int) -> Tensor:
        """The loss of crops of `size` x `size` images."""
        images = random_crops(self.rng, self.crops, size).to(self.vae.device)
        return reconstruction_loss(self.vae, images, self.generator)


def random_crops(rng: random.Random, count: int, size: int) -> Tensor:
    """Square crops of rendered scenes, each around a part of a thing, because background teaches little."""
    scenes = [random_scene(rng) for _ in range(count)]
    images = render(scenes, size, size)
    return torch.stack([crop_near_a_thing(rng, *pair) for pair in zip(images, scenes, strict=True)])


def crop_near_a_thing(rng: random.Random, image: Tensor, scene: Scene) -> Tensor:
    size = image.shape[-1]
    thing = rng.choice(scene.things)
    left, top = (
        int(min(max((centre + rng.uniform(-1, 1) * thing.radius) * size - CROP / 2, 0), size - CROP))
        for centre in (thing.x, thing.y)
    )
    return image[:, top : top + CROP, left : left + CROP]


def reconstruction_loss(vae: AutoencoderKL, images: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + L2 + the L1 of edges, and a weak penalty for latents without zero mean and unit variance."""
    latents = vae.quant_conv(vae.encoder(images))[:, :4]
    noise = torch.randn(latents.shape, generator=generator).to(latents)
    noisy_latents = latents + LATENT_NOISE * noise
    decoded = vae.decoder(vae.post_quant_conv(noisy_latents))
    columns, rows = (functional.l1_loss(decoded.diff(dim=dim), images.diff(dim=dim)) for dim in (-1, -2))
    mean_is_zero = latents.mean((0, 2, 3)).square().mean()
    size_is_one = 0.1 * (latents.square().mean() - 1).abs()
    few_are_large = functional.relu(latents.abs() - 3).mean()
    return (
        functional.l1_loss(decoded, images)
        + functional.mse_loss(decoded, images)
        + 0.3 * (columns + rows)
        + 0.02 * (mean_is_zero + size_is_one + few_are_large)
    )


@torch.no_grad()
def whiten(vae: AutoencoderKL, images: Tensor) -> None:
    """Give each latent channel zero mean and unit variance, so that scaling_factor is 1.

    The transformation is merged into the 1x1 convolutions before and after the latents. The posterior's
    standard deviation becomes a constant, because it was not trained.
    """
    latents = vae.quant_conv(vae.encoder(images))[:, :4]
    mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    weight, bias = vae.quant_conv.weight, vae.quant_conv.bias
    weight[:4] /= std[:, None, None, None]
    bias[:4] = (bias[:4] - mean) / std
    weight[4:] = 0
    bias[4:] = 2 * math.log(POSTERIOR_STD)
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
    vae.post_quant_conv.weight *= std[None, :, None, None]


def psnr(images: Tensor, decoded: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in -1..1."""
    return 10 * math.log10(4 / functional.mse_loss(decoded, images).item())
