"""Unpack a shipped model to continue its training: the opposite of `assemble`."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import shutil
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file

from .looks import LOOKS
from .lora import start_lora_run
from .unet import LAST_ROUND, start_run


def unpack_model(model: Path, folder: Path) -> None:
    """Fill `folder` with the parts of `model`; the UNet is at the first step of its last round.

    Text encoder and VAE are finished. The LoRAs keep their weights and restart at step 0. A model has no
    optimizer states, so the optimizers restart too.

    Raises:
        FileExistsError: `folder` exists; its parts would be lost.
    """
    folder.mkdir(parents=True)
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.text_encoder.save_pretrained(folder / "text" / "text_encoder")
    shutil.copytree(model / "tokenizer", folder / "text" / "tokenizer")
    pipeline.vae.save_pretrained(folder / "vae" / "vae")
    run, *_ = start_run(folder / "unet", pipeline.unet)
    run.step = LAST_ROUND
    run.save()
    for name in LOOKS:
        saved = load_file(model / "loras" / f"{name}.safetensors")
        run, *_ = start_lora_run(name, folder, pipeline.unet, 1)
        run.parts["lora"].load_state_dict({key.removeprefix("unet."): value for key, value in saved.items()})
        run.save()
        pipeline.unet.delete_adapters("default")
