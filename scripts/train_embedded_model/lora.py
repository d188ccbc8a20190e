"""Train the LoRAs on the scenes in another look, with a frozen UNet.

The UNet's first level, which determines single latents, has only convolutions. After 200 steps, at most 0.18
of Pixel_Art's edges were on its grid with LoRAs for linear layers alone, 0.33 with convolutions.
"""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false

import random
from pathlib import Path

import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from .denoising import PURE_NOISE_SHARE, Share
from .looks import LOOKS
from .pipeline import load_text_encoder, load_vae
from .progress import Run, rising_then_falling
from .replay import Replay
from .scenes import Scene
from .unet import load_unet

SEED = 5
RANK = 8
LATENTS_PER_STEP = 16 * 16 * 16
LEARNING_RATE = 2e-3
LINEAR_LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "time_emb_proj"]
CONVOLUTIONS = ["conv1", "conv2", "conv_in", "conv_out", "conv_shortcut", "upsamplers.0.conv"]
SHAPES = {
    (16, 16): 0.3,
    **dict.fromkeys([(16, 24), (24, 16)], 0.05),
    (24, 24): 0.1,
    (32, 32): 0.5,
}


class LoraWeights(nn.Module):
    """The LoRA of a UNet as a part of a run, so that checkpoints have only its weights."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.inner = [unet]  # in a list, so that the frozen weights are not a submodule

    def state_dict(self) -> dict[str, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return get_peft_model_state_dict(self.inner[0])

    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        set_peft_model_state_dict(self.inner[0], state_dict)


def train_lora(name: str, folder: Path, steps: int, device: str) -> None:
    """Train the LoRA of one look for the parts in `folder`; saves `folder`/loras/`name`.safetensors."""
    torch.manual_seed(SEED)
    tokenizer, text_encoder = load_text_encoder(folder / "text")
    vae, unet = load_vae(folder / "vae").to(device), load_unet(folder / "unet").to(device)
    run, params, optimizer = start_lora_run(name, folder, unet, steps)
    rng = random.Random(SEED + run.step)
    generator = torch.Generator().manual_seed(SEED + run.step)

    def render_scenes(scenes: list[Scene], height: int, width: int) -> Tensor:
        return LOOKS[name].render(scenes, height, width, generator)

    replay = Replay(vae, tokenizer, text_encoder.to(device), rng.getrandbits(32), device, render_scenes)
    share = Share(unet, replay)
    for step in run:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * rising_then_falling(step, steps, warmup=20, flat=0.3)
        ((height, width),) = rng.choices(list(SHAPES), list(SHAPES.values()))
        loss = share.loss(LATENTS_PER_STEP // (height * width), height, width, pure_noise=PURE_NOISE_SHARE)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.report(loss)
    weights = {key: value.half().cpu().contiguous() for key, value in run.parts["lora"].state_dict().items()}
    StableDiffusionPipeline.save_lora_weights(
        folder / "loras", unet_lora_layers=weights, weight_name=f"{name}.safetensors"
    )


def start_lora_run(
    name: str, folder: Path, unet: UNet2DConditionModel, steps: int
) -> tuple[Run, list[nn.Parameter], torch.optim.Optimizer]:
    """Add a trainable LoRA to the UNet; the run continues from its checkpoint if there is one."""
    unet.add_adapter(
        LoraConfig(
            r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=LINEAR_LAYERS + CONVOLUTIONS
        )
    )
    params = [param for param in unet.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, LEARNING_RATE, weight_decay=0)
    run = Run(folder / "loras" / name, steps, {"lora": LoraWeights(unet), "adamw": optimizer})
    return run, params, optimizer
