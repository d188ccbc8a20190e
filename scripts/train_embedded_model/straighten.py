"""Straighten the contours of a finished model: python -m scripts.train_embedded_model.straighten.

The predictions with and without the prompt bend contours by less than a pixel, but differently, and guidance
multiplies the difference. So this stage trains the guided prediction, at the timesteps at which noisy
latents show the object, with two losses. The first is how far the decoded prediction of a measured shape is
from a rendered image, and its contours from that shape (bends.py), on noisy latents that the UNet itself
sampled. The second is the error of the velocity, mostly at contours, on rendered images that are blended with
generated ones.

In the first steps of sampling, and in all steps of a short sampling, the UNet keeps its predictions: they are
compared with those of the finished model, on noisy latents that the finished model itself sampled from noise.
"""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import copy
import random
import shutil
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import click
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .assemble import edit_json
from .bends import bend_loss, image_loss
from .captions import random_caption
from .continuing import unpack_model
from .contours import GATES, SIDE
from .denoising import LEAST_BLENDED_TIMESTEP, add_noise, over_latents, random_row
from .muon import muon_and_adamw, set_learning_rates
from .pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, load_text_encoder, load_vae, new_scheduler
from .progress import Run, rising_then_falling
from .replay import Replay, Sample
from .scenes import OVERLAPPING, Scene, single, training_scene
from .score import FEW_STEPS, FEW_STEPS_GUIDANCE
from .threads import step_together
from .unet import load_unet

SEED = 6
STEPS = 1500
LEARNING_RATE = 2e-4
LATENTS_PER_SHARE = 2 * 32 * 32
SHAPES = {(32, 32): 0.7, (16, 16): 0.1, **dict.fromkeys([(16, 24), (24, 16), (24, 32), (32, 24)], 0.05)}
MEASURED_SHARE = 0.5  # of the scenes; the others are any training scenes
# Below `SHOWN` the object is visible in noisy latents; from there on, the UNet is kept as it was.
LEAST_TIMESTEP, SHOWN = 40, 600
KEPT_SHARE, KEPT_WEIGHT = 0.85, 3.0
KEPT_STEPS = ((FEW_STEPS, FEW_STEPS_GUIDANCE, 0), (NUM_INFERENCE_STEPS, GUIDANCE_SCALE, SHOWN))
FULL_WEIGHT = 0.3  # sigma squared, at about timestep 200
LATE_TIMESTEPS = 1.4  # exponent; above 1, more of the last steps, where contours are decided
LEAST_EDGE, MOST_EDGE = 0.25, 8  # of the weight of a position, before it is divided by the mean
CAPACITY, FRESH = 1000, 0.1  # samples of each shape, for each thread; share of steps with new samples
# The loss of contours: share of the steps, images of a step of a thread, and its weight. Hard shapes are more
# frequent.
CONTOUR_SHARE, CONTOUR_IMAGES, CONTOUR_WEIGHT = 0.58, 2, 5.0
# Noisy latents of each thread, and the share of its steps with new ones: they are of nearly the present UNet.
LEAST_ON_PATH, MOST_ON_PATH, FRESH_PATH = 100, 260, 0.2
CONTOUR_SHAPES = {"circle": 0.1, "ring": 0.35, "square": 0.27, "diamond": 0.28}
USUAL_SHARE = 0.85  # of default size and position, as in the gates
MOST_BENT = 0.4  # beyond it the image does not show the shape
BENDING_TIMESTEPS = range(599, 0, -100)
GHOST_SHARE, MOST_GHOST = 0.3, 0.4  # of the noisy latents; share of the object elsewhere in them

T = TypeVar("T")


@dataclass(frozen=True)
class Bent:
    """Latents of a rendered image, those that the UNet made of them, and those of another position."""

    latents: Tensor
    bent: Tensor
    elsewhere: Tensor
    prompt_embeds: Tensor


def contour_weights(latents: Tensor) -> Tensor:
    """How much each position counts, shape (B, 1, height, width), mean 1: most where latents change."""
    across = functional.pad(latents.diff(dim=3), (0, 1))
    down = functional.pad(latents.diff(dim=2), (0, 0, 0, 1))
    change = (across.square() + down.square()).sum(1, keepdim=True).sqrt()
    change = functional.avg_pool2d(functional.pad(change, (1, 1, 1, 1), mode="replicate"), 3, 1)
    weights = LEAST_EDGE + (change / change.mean((2, 3), keepdim=True).clamp_min(1e-6)).clamp_max(MOST_EDGE)
    return weights / weights.mean((2, 3), keepdim=True)


@dataclass(frozen=True)
class Sampled:
    """Noisy latents that the finished model sampled, and its velocities there, with guidance and without."""

    noisy_latents: Tensor
    timestep: Tensor
    guided: Tensor
    cond: Tensor
    prompt_embeds: Tensor


@dataclass(frozen=True)
class OnPath:
    """Noisy latents of a sampling with the UNet, below SHOWN, of a scene with one object."""

    noisy_latents: Tensor
    timestep: Tensor
    prompt_embeds: Tensor
    scene: Scene


def measured_scene(rng: random.Random) -> Scene:
    """A single solid object of a shape whose contours are measured, without held-out combinations."""
    while True:
        scene = single(rng, OVERLAPPING)
        (kind,) = scene.kinds
        if kind.shape in GATES and kind.style == "solid" and not scene.held_out:
            return scene


def contour_scene(rng: random.Random) -> Scene:
    """A measured scene; mostly with the hardest shapes, and of default size and position."""
    (shape,) = rng.choices(list(CONTOUR_SHAPES), list(CONTOUR_SHAPES.values()))
    usual = rng.random() < USUAL_SHARE
    while True:
        scene = measured_scene(rng)
        (kind,) = scene.kinds
        if kind.shape == shape and not (usual and (kind.size or scene.position)):
            return scene


def full_caption(scene: Scene, rng: random.Random) -> str:
    """A caption that says all that the image shows."""
    while True:
        caption = random_caption(scene, rng)
        if all(caption.values.get(field) for field in ("shape1", "colour1", "background")):
            return caption.text


def any_scene(rng: random.Random) -> Scene:
    return measured_scene(rng) if rng.random() < MEASURED_SHARE else training_scene(rng)


class Share:
    """One thread's share of every batch, and the UNet before and after its changes."""

    def __init__(self, unet: UNet2DConditionModel, before: UNet2DConditionModel, replay: Replay):
        self.unet, self.before, self.replay = unet, before, replay
        self.alphas_cumprod = new_scheduler().alphas_cumprod
        self.no_prompt = replay.embed([""])
        self.bent: dict[tuple[int, int], list[Bent]] = defaultdict(list)
        self.sampled: dict[tuple[int, int], list[Sampled]] = defaultdict(list)
        self.on_path: list[OnPath] = []

    def loss(self, size: int, height: int, width: int, keep: bool) -> Tensor:
        """The error of the guided and of the conditional velocity or, with `keep`, how much they changed."""
        if keep:
            return KEPT_WEIGHT * self.change(size, height, width)
        generator = self.replay.generator
        samples = self.choose(self.bent[height, width], self.bend, size, height, width)
        latents, bent, elsewhere, prompt_embeds = stack_fields(samples)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        shares = torch.rand(size, generator=generator) ** LATE_TIMESTEPS
        timesteps = (LEAST_TIMESTEP + (SHOWN - LEAST_TIMESTEP) * shares).long()
        alpha_squared = over_latents(self.alphas_cumprod[timesteps]).to(latents)
        blends = over_latents(torch.rand(size, generator=generator)).to(latents)
        has_ghost = torch.rand(size, generator=generator) < GHOST_SHARE
        has_ghost &= timesteps >= LEAST_BLENDED_TIMESTEP
        ghosts = over_latents(MOST_GHOST * torch.rand(size, generator=generator) * has_ghost).to(latents)
        displacement = blends * (bent - latents) + ghosts * (elsewhere - latents)
        noisy_latents, velocity = add_noise(latents, displacement, noise, alpha_squared)
        # A wrong velocity moves the predicted latents by sigma times as much.
        weight = ((1 - alpha_squared) / FULL_WEIGHT).clamp_max(1) * contour_weights(latents)
        predictions = self.predict(self.unet, noisy_latents, timesteps, prompt_embeds)
        errors = [(weight * (prediction - velocity).square()).mean() for prediction in predictions]
        return torch.stack(errors).mean()

    def contour_loss(self) -> Tensor:
        """How far the decoded guided prediction is from a rendered image, and its contours from the shape's,
        on noisy latents that the UNet itself sampled.
        """
        while len(self.on_path) < LEAST_ON_PATH or self.replay.rng.random() < FRESH_PATH:
            self.on_path += self.sample_path()
            del self.on_path[:-MOST_ON_PATH]
        samples = self.replay.rng.sample(self.on_path, CONTOUR_IMAGES)
        noisy_latents = torch.stack([sample.noisy_latents for sample in samples])
        timesteps = torch.stack([sample.timestep for sample in samples])
        prompt_embeds = torch.stack([sample.prompt_embeds for sample in samples])
        velocity, _ = self.predict(self.unet, noisy_latents, timesteps, prompt_embeds)
        alpha_squared = over_latents(self.alphas_cumprod[timesteps]).to(noisy_latents)
        latents = alpha_squared.sqrt() * noisy_latents - (1 - alpha_squared).sqrt() * velocity
        images = self.replay.vae.decode(latents).sample.cpu()
        losses = [0 * images.sum()]
        for sample, image in zip(samples, images, strict=True):
            with suppress(ValueError, torch.linalg.LinAlgError):  # no object, or no polygon
                losses.append(image_loss(sample.scene, image))
                bent = bend_loss(sample.scene.kinds[0].shape, image)
                if bent < MOST_BENT:
                    losses.append(bent)
        return CONTOUR_WEIGHT * torch.stack(losses).sum() / CONTOUR_IMAGES

    @torch.no_grad()
    def sample_path(self) -> list[OnPath]:
        """Sample images of measured scenes, as a request would."""
        scenes = [contour_scene(self.replay.rng) for _ in range(CONTOUR_IMAGES)]
        prompt_embeds = self.replay.embed([full_caption(scene, self.replay.rng) for scene in scenes])
        scheduler = new_scheduler()
        scheduler.set_timesteps(NUM_INFERENCE_STEPS)
        shape = len(scenes), 4, SIDE // 8, SIDE // 8
        latents = torch.randn(shape, generator=self.replay.generator).to(prompt_embeds)
        found: list[OnPath] = []
        for timestep in scheduler.timesteps:
            if timestep < SHOWN:
                found += map(OnPath, latents, timestep.expand(len(scenes)), prompt_embeds, scenes)
            velocity, _ = self.predict(self.unet, latents, timestep, prompt_embeds)
            latents = scheduler.step(velocity, int(timestep), latents).prev_sample
        return found

    def change(self, size: int, height: int, width: int) -> Tensor:
        """How much the velocities changed on noisy latents that the finished model sampled."""
        samples = self.choose(self.sampled[height, width], self.sample, size, height, width)
        noisy_latents, timesteps, *targets, prompt_embeds = stack_fields(samples)
        predictions = self.predict(self.unet, noisy_latents, timesteps, prompt_embeds)
        return torch.stack(list(map(functional.mse_loss, predictions, targets))).mean()

    def predict(
        self, unet: UNet2DConditionModel, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocities with guidance and without."""
        both = torch.cat([self.no_prompt.expand_as(prompt_embeds), prompt_embeds])
        timesteps = timesteps.to(noisy_latents.device).expand(len(noisy_latents)).repeat(2)
        uncond, cond = unet(noisy_latents.repeat(2, 1, 1, 1), timesteps, both).sample.chunk(2)
        return torch.lerp(uncond, cond, GUIDANCE_SCALE), cond

    def choose(
        self, pool: list[T], make: Callable[[list[Sample]], list[T]], size: int, height: int, width: int
    ) -> list[T]:
        """Random samples of a pool; a part of it is replaced by new ones."""
        while len(pool) < 4 * size or self.replay.rng.random() < FRESH:
            pool += make(self.replay.batch(size, height, width))
            del pool[:-CAPACITY]
        return self.replay.rng.sample(pool, size)

    @torch.no_grad()
    def bend(self, samples: list[Sample]) -> list[Bent]:
        """Denoise noisy latents in a few guided steps; objects stay where they are but get other contours."""
        generator = self.replay.generator
        latents, elsewhere = (
            torch.stack([random_row(sample.latents, generator) for sample in samples]) for _ in range(2)
        )
        prompt_embeds = torch.stack([sample.prompt_embeds for sample in samples]).float()
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        predicted = latents
        for timestep in BENDING_TIMESTEPS:
            alpha, sigma = self.alphas_cumprod[timestep].sqrt(), (1 - self.alphas_cumprod[timestep]).sqrt()
            noisy_latents = alpha * predicted + sigma * noise
            velocity, _ = self.predict(self.unet, noisy_latents, torch.tensor(timestep), prompt_embeds)
            predicted = alpha * noisy_latents - sigma * velocity
            noise = sigma * noisy_latents + alpha * velocity
        return list(map(Bent, latents, predicted, elsewhere, prompt_embeds))

    @torch.no_grad()
    def sample(self, samples: list[Sample]) -> list[Sampled]:
        """Sample from noise with the finished model, as a request would."""
        prompt_embeds = torch.stack([sample.prompt_embeds for sample in samples]).float()
        shape = len(samples), *samples[0].latents.shape[1:]
        found: list[Sampled] = []
        for steps, guidance_scale, last_timestep in KEPT_STEPS:
            scheduler = new_scheduler()
            scheduler.set_timesteps(steps)
            latents = torch.randn(shape, generator=self.replay.generator).to(prompt_embeds)
            for timestep in scheduler.timesteps[scheduler.timesteps >= last_timestep]:
                guided, cond = self.predict(self.before, latents, timestep, prompt_embeds)
                found += map(Sampled, latents, timestep.expand(len(samples)), guided, cond, prompt_embeds)
                velocity = cond + (guided - cond) * (guidance_scale - 1) / (GUIDANCE_SCALE - 1)
                latents = scheduler.step(velocity, int(timestep), latents).prev_sample
        return found


def stack_fields(samples: Sequence[Bent] | Sequence[Sampled]) -> tuple[Tensor, ...]:
    return tuple(map(torch.stack, zip(*(vars(each).values() for each in samples), strict=True)))


def straighten(folder: Path, steps: int, device: str, threads: int) -> None:
    """Train the UNet in `folder` on; the moving average in `folder`/straight is the result."""
    tokenizer, text_encoder = load_text_encoder(folder / "text")
    vae, before = load_vae(folder / "vae").to(device), load_unet(folder / "unet").to(device)
    unet = copy.deepcopy(before).requires_grad_(True)
    workers = ThreadPoolExecutor(threads)
    optimizers = muon_and_adamw(
        unet, LEARNING_RATE, LEARNING_RATE, except_for=("conv_in", "conv_out"), workers=workers
    )
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.985))
    parts = {"unet": unet, "average": average, "muon": optimizers[0], "adamw": optimizers[1]}
    run = Run(folder / "straight", steps, parts)
    rng = random.Random(SEED + run.step)
    shares = []
    for _ in range(threads):
        tokenizer = copy.deepcopy(tokenizer)  # tokenizers are not thread-safe
        replay = Replay(
            vae, tokenizer, text_encoder.to(device), rng.getrandbits(32), device, new_scene=any_scene
        )
        shares.append(Share(unet, before, replay))
    torch.set_num_threads(1)
    with workers:
        for step in run:
            set_learning_rates(optimizers, rising_then_falling(step, steps, warmup=20, flat=0.3))
            ((height, width),) = rng.choices(list(SHAPES), list(SHAPES.values()))
            size = LATENTS_PER_SHARE // (height * width)
            compute_losses: list[Callable[[], Tensor]] = (
                [share.contour_loss for share in shares]
                if rng.random() < CONTOUR_SHARE
                else [partial(share.loss, size, height, width, rng.random() < KEPT_SHARE) for share in shares]
            )
            run.report(step_together(workers, compute_losses, unet, optimizers, max_norm=1.0))
            average.update_parameters(unet)


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option("--folder", type=Path, default=Path("build/straight"), show_default=True, help="checkpoints")
@click.option(
    "--output", type=Path, default=Path("build/straightened"), show_default=True, help="finished model"
)
@click.option("--steps", default=STEPS, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--threads", type=click.IntRange(1, 4), default=2, show_default=True)
def main(model: Path, folder: Path, output: Path, steps: int, device: str, threads: int) -> None:
    """Train a finished model's UNet on, and assemble it with the other parts, which do not change."""
    if not folder.exists():
        unpack_model(model, folder)
    straighten(folder, steps, device, threads)
    shutil.copytree(model, output, dirs_exist_ok=True)
    unet = load_unet(folder / "straight")
    unet.half().save_pretrained(output / "unet")
    for weights in (output / "unet").glob("*.safetensors"):
        weights.chmod(0o644)  # safetensors writes files that only their owner can read
    for config in (output / "unet").glob("*config.json"):
        edit_json(config, {})


if __name__ == "__main__":
    main()
