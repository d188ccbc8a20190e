"""Build a Stable Diffusion pipeline from the trained parts, and generate images with it."""

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
    """The noise schedule of the training, and the scheduler that is saved with the model.

    beta_end is 0.02 rather than Stable Diffusion's 0.012: at the last timestep sqrt(alpha_bar) is then 0.015,
    not 0.068. So the background's brightness is almost invisible there, and the first step takes it from the
    prompt alone. Zero terminal SNR (arXiv:2305.08891) would be exact, but diffusers' Heun, KDPM2, LMS and
    singlestep DPM++ do not support it and start with too little noise. With these betas all samplers agree.
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
def generate(
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
    """Generate one image per prompt; by default the seed of an image is its index.

    Returns:
        float32, shape (B, 3, height, width), in -1..1, on the CPU.
    """
    seeds = seeds or list(range(len(prompts)))
    pipeline.set_progress_bar_config(disable=True)
    images = []
    for start in range(0, len(prompts), batch_size):
        batch = slice(start, start + batch_size)
        output = pipeline(
            prompts[batch],
            negative_prompt=negative_prompts[batch] if negative_prompts else None,
            height=height,
            width=width,
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[batch]],
            output_type="pt",
        )
        assert isinstance(output, StableDiffusionPipelineOutput)
        images.append(torch.as_tensor(output.images).cpu().float() * 2 - 1)
    return torch.cat(images)
