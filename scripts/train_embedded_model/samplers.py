"""Score the same held-out prompts with every sampler: python -m scripts.train_embedded_model.samplers."""

from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

from . import contours
from .captions import plain_caption
from .pipeline import generate
from .progress import image_grid
from .score import held_out_scenes, score

PROMPTS = {"single": 10, "group": 6}
CIRCLES = 12
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {}),
    "dpm++ 2m karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpm++ singlestep": ("DPMSolverSinglestepScheduler", {"lower_order_final": True}),
    "unipc": ("UniPCMultistepScheduler", {}),
    "lcm": ("LCMScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
}


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option("--size", type=int, default=128, show_default=True)
@click.option("--steps", type=int, default=20, show_default=True)
@click.option("--samples", type=Path, help="file for a grid of all images, one row per sampler")
def main(model: Path, size: int, steps: int, samples: Path | None) -> None:
    """Score every sampler with the model's own configuration, and count its round circles at 256x256."""
    scenes = held_out_scenes(PROMPTS)
    circles = [plain_caption(scene) for scene in contours.held_out_scenes("circle", CIRCLES)]
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    config = pipeline.scheduler.config
    rows = []
    print(
        "| sampler | background | object colour | single, everything | group, count | round circles |\n"
        "|---|---|---|---|---|---|"
    )
    for name, (scheduler, options) in SAMPLERS.items():
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(config, **options)
        prompts = [plain_caption(scene) for scene in scenes]
        images = generate(pipeline, prompts, size, size, num_inference_steps=steps)
        table = score(scenes, images)
        values = (table[row] for row in ("background", "object colour", "single, everything", "group, count"))
        large = generate(pipeline, circles, contours.SIDE, contours.SIDE, num_inference_steps=steps)
        is_round = [contours.is_within(contours.measure("circle", image)) for image in large]
        figures = "".join(f" {value:.2f} |" for value in values)
        print(f"| {name} |{figures} {sum(is_round)} of {CIRCLES} |", flush=True)
        rows.append(images)
    if samples:
        image_grid(torch.cat(rows), len(scenes)).save(samples)


if __name__ == "__main__":
    main()
