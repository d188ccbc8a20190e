"""Take a shipped model apart, so that its training can go on: the opposite of `assemble`."""

# diffusers and transformers leave out of their annotations what these calls rely on.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import shutil
from pathlib import Path

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from safetensors.torch import load_file

from .looks import LOOKS
from .lora import begin_lora_run
from .unet import LAST_ROUND, begin_run


def take_apart(model: Path, folder: Path) -> None:
    """Fill `folder` with the parts of `model`, its UNet at the start of its last round.

    Text encoder and autoencoder are finished; the LoRAs begin their steps anew, from what they are. A model
    does not carry the state of optimizers, so that they begin anew too.

    Raises:
        FileExistsError: `folder` is there already, with parts that would be lost.
    """
    folder.mkdir(parents=True)
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.text_encoder.save_pretrained(folder / "text" / "text_encoder")
    shutil.copytree(model / "tokenizer", folder / "text" / "tokenizer")
    pipeline.vae.save_pretrained(folder / "vae" / "vae")
    run, *_ = begin_run(folder / "unet", pipeline.unet)
    run.step = LAST_ROUND
    run.save()
    for name in LOOKS:
        saved = load_file(model / "loras" / f"{name}.safetensors")
        run, *_ = begin_lora_run(name, folder, pipeline.unet, 1)
        run.parts["lora"].load_state_dict({key.removeprefix("unet."): value for key, value in saved.items()})
        run.save()
        pipeline.unet.delete_adapters("default")
