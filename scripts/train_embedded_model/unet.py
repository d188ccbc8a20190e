"""Train the UNet to denoise latents, given a caption."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false

import copy
import random
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .denoising import PURE_NOISE_SHARE, Share
from .muon import muon_and_adamw, set_learning_rates
from .pipeline import generate, load_text_encoder, load_vae, make_pipeline
from .progress import Run, image_grid, rising_then_falling
from .replay import Replay
from .threads import step_together

SEED = 3
LATENTS_PER_STEP = 32 * 16 * 16  # a step costs the same at every size
SAMPLE_EVERY = 1000
SAMPLES = (
    "a red circle on a blue background",
    "a green square on a white background",
    "an orange star on a black background",
    "a purple heart on a yellow background",
    "two cyan triangles on a pink background",
    "three yellow stars on a black background",
    "four white rings on a brown background",
    "a blue moon left of a red cross on a gray background",
)

# Heights and widths of latents, with their sampling weights. Small latents come first, because a 16x16 latent
# costs a quarter of a 32x32 one. But the UNet does not generalize to other sizes by itself: with a twentieth
# of the steps at 32x32, counts were right at 128 pixels and wrong at 256; with none at 8x8, most images of 64
# pixels were empty.
SMALL_FIRST = {
    (16, 16): 0.55,
    **dict.fromkeys([(16, 24), (24, 16), (12, 20), (20, 12)], 0.04),
    (32, 32): 0.21,
    **dict.fromkeys([(24, 40), (40, 24)], 0.04),
}
# Sizes that were missing here became worse than similar ones: shapes at 256x192, counts at 144x208.
LARGE_LATER = {
    (8, 8): 0.03,
    **dict.fromkeys([(8, 16), (16, 8), (12, 12)], 0.01),
    (16, 16): 0.2,
    **dict.fromkeys([(16, 24), (24, 16), (12, 20), (20, 12), (16, 32), (32, 16)], 0.02),
    **dict.fromkeys([(18, 26), (26, 18)], 0.015),
    **dict.fromkeys([(12, 32), (32, 12), (16, 48), (48, 16), (16, 64), (64, 16)], 0.01),
    (24, 24): 0.03,
    **dict.fromkeys([(24, 32), (32, 24)], 0.025),
    (32, 32): 0.75,
    **dict.fromkeys([(24, 40), (40, 24), (28, 36), (36, 28)], 0.02),
}


@dataclass(frozen=True)
class Round:
    """A phase of the training: its steps, latent sizes, and peak learning rate.

    `blend` and `pure_noise` are arguments of `Share.loss`.
    """

    steps: int
    shapes: dict[tuple[int, int], float]
    rate: float = 1.0
    blend: float = 0.0
    pure_noise: float = 0.0


# Pure noise is trained last: with it from the first step, shapes of single objects at 256x256 stayed rough.
ROUNDS = (
    Round(2000, SMALL_FIRST),
    Round(5000, LARGE_LATER, blend=0.5),
    Round(1600, LARGE_LATER | {(16, 16): 0.35, (32, 32): 1.1}, rate=0.4, blend=0.5),
    Round(800, {(16, 16): 0.3, (32, 32): 0.7}, rate=0.35, blend=0.5, pure_noise=PURE_NOISE_SHARE),
)
TOTAL_STEPS = sum(part.steps for part in ROUNDS)
LAST_ROUND = TOTAL_STEPS - ROUNDS[-1].steps  # its first step


def train_unet(folder: Path, device: str, threads: int) -> None:
    """Train the UNet with the parts in the parent of `folder`; its moving average is the result."""
    tokenizer, text_encoder = load_text_encoder(folder.parent / "text")
    vae = load_vae(folder.parent / "vae")
    torch.manual_seed(SEED)
    unet = new_unet().to(device)
    workers = ThreadPoolExecutor(threads)
    run, average, optimizers = start_run(folder, unet, workers)
    rng = random.Random(SEED + run.step)
    vae.to(device)
    text_encoder.to(device)
    shares = []
    for _ in range(threads):
        tokenizer = copy.deepcopy(tokenizer)  # tokenizers are not thread-safe
        replay = Replay(vae, tokenizer, text_encoder, rng.getrandbits(32), device)
        shares.append(Share(unet, replay))
    torch.set_num_threads(1)
    with workers:
        for step in run:
            current, _ = round_of(step)
            set_learning_rates(optimizers, rate_of(step))
            ((height, width),) = rng.choices(list(current.shapes), list(current.shapes.values()))
            share_size = LATENTS_PER_STEP // (height * width * threads)
            compute_losses = [
                partial(share.loss, share_size, height, width, current.blend, current.pure_noise)
                for share in shares
            ]
            run.report(step_together(workers, compute_losses, unet, optimizers, max_norm=2.0))
            average.update_parameters(unet)
            if (step + 1) % SAMPLE_EVERY == 0:
                pipeline = make_pipeline(average.module, vae, tokenizer, text_encoder)
                images = generate(pipeline, list(SAMPLES), 256, 256, num_inference_steps=10)
                image_grid(images, 4).save(folder / f"samples_{step + 1}.png")


def rate_of(step: int) -> float:
    """The learning rate decays over the first two rounds, and again, from a lower peak, in each later one.

    Restarts as in Loshchilov & Hutter 2017, arXiv:1608.03983.
    """
    falls_after = ROUNDS[0].steps + ROUNDS[1].steps
    if step < falls_after:
        return rising_then_falling(step, falls_after, warmup=40, flat=0.4)
    current, done = round_of(step)
    return current.rate * rising_then_falling(done, current.steps, warmup=40, flat=0.3)


def start_run(
    folder: Path, unet: UNet2DConditionModel, workers: Executor | None = None
) -> tuple[Run, AveragedModel, list[torch.optim.Optimizer]]:
    """The run of a UNet, its moving average and its optimizers, from the checkpoint in `folder` if any."""
    optimizers = muon_and_adamw(unet, 2e-3, 2e-3, except_for=("conv_in", "conv_out"), workers=workers)
    average = AveragedModel(unet, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    parts = {"unet": unet, "average": average, "muon": optimizers[0], "adamw": optimizers[1]}
    return Run(folder, TOTAL_STEPS, parts), average, optimizers


def round_of(step: int) -> tuple[Round, int]:
    """The round of a step, and the number of the step within it."""
    for each in ROUNDS:
        if step < each.steps:
            return each, step
        step -= each.steps
    raise ValueError("The step is after the last round.")


def new_unet() -> UNet2DConditionModel:
    """Stable Diffusion's UNet with three narrow levels: 3.8 M parameters; its initial output is zero."""
    unet = UNet2DConditionModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=(48, 96, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=128,
        attention_head_dim=4,  # actually the number of heads (diffusers issue 2011)
        norm_num_groups=4,
    )
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    return unet


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The averaged UNet from a checkpoint."""
    unet = new_unet()
    average = AveragedModel(unet)
    average.load_state_dict(torch.load(folder / "checkpoint.pt")["average"])
    unet.load_state_dict(average.module.state_dict())
    return unet.eval().requires_grad_(False)
