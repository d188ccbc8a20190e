"""Straighten the contours of a finished model: python -m scripts.train_embedded_model.straighten.

The predictions with and without the prompt bend contours by less than a pixel, but differently, and guidance
multiplies the difference. So this stage trains the guided prediction, at the timesteps at which noisy
latents show the object: how far the decoded prediction of a measured shape is from a rendered image, and its
contours from that shape (bends.py), on noisy latents that the UNet itself sampled.

In the first steps of sampling, and in all steps of a short sampling, the UNet keeps its predictions: they are
compared with those of the finished model, on noisy latents that the finished model itself sampled from noise.
"""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import copy
import operator
import random
import shutil
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .assemble import edit_json
from .bends import shape_losses
from .captions import random_caption
from .continuing import unpack_model
from .contours import GATES, SIDE
from .denoising import over_latents
from .muon import muon_and_adamw, set_learning_rates
from .pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, load_text_encoder, load_vae, new_scheduler
from .progress import Run, rising_then_falling
from .replay import Replay, Sample
from .scenes import COLOURS, OVERLAPPING, Scene, single, training_scene
from .score import FEW_STEPS, FEW_STEPS_GUIDANCE
from .threads import step_together
from .unet import load_unet

SEED = 6
STEPS = 2500
LEARNING_RATE = 2e-4
LATENTS_PER_SHARE = 2 * 32 * 32
SHAPES = {(32, 32): 0.7, (16, 16): 0.1, **dict.fromkeys([(16, 24), (24, 16), (24, 32), (32, 24)], 0.05)}
MEASURED_SHARE = 0.5  # of the scenes; the others are any training scenes
# Below `SHOWN` the object is visible in noisy latents; from there on, the UNet is kept as it was.
SHOWN = 600
KEPT_WEIGHT = 3.0
# Steps, guidance and last timestep of the samplings whose predictions are kept.
KEPT_FEW, KEPT_USUAL = (FEW_STEPS, FEW_STEPS_GUIDANCE, 0), (NUM_INFERENCE_STEPS, GUIDANCE_SCALE, SHOWN)
KEPT_STEPS = (KEPT_FEW, KEPT_FEW, KEPT_USUAL)
CAPACITY, FRESH = 1000, 0.1  # samples of each shape, for each thread; share of steps with new samples
# The loss of contours: share of the steps, images of a step of a thread, and its weight. Hard shapes are more
# frequent.
CONTOUR_SHARE, CONTOUR_IMAGES, CONTOUR_WEIGHT = 0.55, 2, 5.0
# Noisy latents of each thread, and the share of its steps with new ones: they are of nearly the present UNet.
LEAST_ON_PATH, MOST_ON_PATH, FRESH_PATH = 100, 260, 0.2
CONTOUR_SHAPES = {"circle": 0.08, "ring": 0.4, "square": 0.24, "diamond": 0.28}
USUAL_SHARE = 0.85  # of default size and position, as in the gates
# Scenes with less difference in brightness, in 0..255, are the hardest; the others are rarer, by the ratio.
LOW_CONTRAST, BRIGHTNESS = 40, (0.299, 0.587, 0.114)  # of red, green and blue
MOST_BENT = 0.4  # beyond it the image does not show the shape


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
    """A measured scene; mostly with the hardest shapes and colours, and of default size and position."""
    (shape,) = rng.choices(list(CONTOUR_SHAPES), list(CONTOUR_SHAPES.values()))
    usual = rng.random() < USUAL_SHARE
    while True:
        scene = measured_scene(rng)
        (kind,) = scene.kinds
        contrast = abs(brightness(kind.colour) - brightness(scene.background))
        if rng.random() * max(contrast, LOW_CONTRAST) > LOW_CONTRAST:
            continue
        if kind.shape == shape and not (usual and (kind.size or scene.position)):
            return scene


def brightness(colour: str) -> float:
    return sum(map(operator.mul, BRIGHTNESS, COLOURS[colour]))


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
        self.sampled: dict[tuple[int, int], list[Sampled]] = defaultdict(list)
        self.on_path: list[OnPath] = []

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
                difference, bend = shape_losses(sample.scene, image)
                losses += [difference, bend] if bend < MOST_BENT else [difference]
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

    def kept_loss(self, size: int, height: int, width: int) -> Tensor:
        """How much the velocities changed on noisy latents that the finished model sampled."""
        pool, rng = self.sampled[height, width], self.replay.rng
        while len(pool) < 4 * size or rng.random() < FRESH:
            pool += self.sample(self.replay.batch(size, height, width))
            del pool[:-CAPACITY]
        samples = [list(vars(sample).values()) for sample in rng.sample(pool, size)]
        noisy_latents, timesteps, *targets, prompt_embeds = map(torch.stack, zip(*samples, strict=True))
        predictions = self.predict(self.unet, noisy_latents, timesteps, prompt_embeds)
        return KEPT_WEIGHT * torch.stack(list(map(functional.mse_loss, predictions, targets))).mean()

    def predict(
        self, unet: UNet2DConditionModel, noisy_latents: Tensor, timesteps: Tensor, prompt_embeds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The velocities with guidance and without."""
        both = torch.cat([self.no_prompt.expand_as(prompt_embeds), prompt_embeds])
        timesteps = timesteps.to(noisy_latents.device).expand(len(noisy_latents)).repeat(2)
        uncond, cond = unet(noisy_latents.repeat(2, 1, 1, 1), timesteps, both).sample.chunk(2)
        return torch.lerp(uncond, cond, GUIDANCE_SCALE), cond

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
                else [partial(share.kept_loss, size, height, width) for share in shares]
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
