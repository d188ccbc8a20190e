"""Put the trained parts together as an ordinary Stable Diffusion pipeline."""

from pathlib import Path

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

NUM_INFERENCE_STEPS = 20
GUIDANCE_SCALE = 4.0


def new_scheduler() -> DDIMScheduler:
    """The noise that the UNet is trained on, and the sampler that is saved with it.

    beta_end is 0.02 rather than Stable Diffusion's 0.012: at the last timestep sqrt(alpha_bar) is then 0.015,
    not 0.068, so almost nothing of the background's brightness is left to see and the first step draws it
    from the prompt alone. The rescaling to zero terminal SNR (arXiv:2305.08891) would be exact, but Heun,
    KDPM2, LMS and the single-step DPM++ do not know it and then start from too little noise; with these betas
    every sampler agrees.
    """
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.02,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def load_text_encoder(folder: Path) -> tuple[CLIPTokenizer, CLIPTextModel]:
    text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").eval().requires_grad_(False)
    return CLIPTokenizer.from_pretrained(folder / "tokenizer"), text_encoder


def load_vae(folder: Path) -> AutoencoderKL:
    return AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)


def make_pipeline(
    unet: UNet2DConditionModel, vae: AutoencoderKL, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel
) -> StableDiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=new_scheduler(),  # pyright: ignore[reportArgumentType]  the annotation is too narrow
        safety_checker=None,  # pyright: ignore[reportArgumentType]  optional, whatever the annotation says
        feature_extractor=None,  # pyright: ignore[reportArgumentType]  likewise
        requires_safety_checker=False,
    )


@torch.no_grad()
def draw(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    height: int,
    width: int,
    num_inference_steps: int = NUM_INFERENCE_STEPS,
    guidance_scale: float = GUIDANCE_SCALE,
    negative_prompts: list[str] | None = None,
    seeds: list[int] | None = None,
    batch_size: int = 8,
) -> Tensor:
    """Draw prompts, each from its index as the seed unless `seeds` are given.

    The pictures have the shape (B, 3, height, width), lie in -1..1 and are on the CPU.
    """
    seeds = seeds or list(range(len(prompts)))
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        drawn = pipeline(
            prompts[batch],
            negative_prompt=negative_prompts[batch] if negative_prompts else None,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
            output_type="pt",
        )
        assert isinstance(drawn, StableDiffusionPipelineOutput)
        images.append(torch.as_tensor(drawn.images).cpu().float() * 2 - 1)
    return torch.cat(images)
