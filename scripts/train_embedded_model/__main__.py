"""Run every training stage, each from its last checkpoint: python -m scripts.train_embedded_model."""

import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import click
import torch

from .assemble import assemble
from .continuing import unpack_model
from .lora import train_lora
from .text_encoder import train_text_encoder
from .unet import train_unet
from .vae import train_vae

TEXT_STEPS = 600
VAE_STEPS = 2400
# In this order, two processes finish at about the same time.
LORA_STEPS = {"Pixel_Art": 1800, "Crayons": 1400, "Paint_Splash": 900, "Logo": 600}

# By default glibc returns large blocks to the kernel and requests them again at every step: half of the time
# went to page faults. These settings keep the blocks. Waiting threads sleep, because cores are often shared.
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "268435456",
    "OMP_WAIT_POLICY": "passive",
    "THP_MEM_ALLOC_ENABLE": "1",
}


@click.command()
@click.option(
    "--folder", type=Path, default=Path("build/embedded"), show_default=True, help="checkpoints and images"
)
@click.option(
    "--output", type=Path, default=Path("hypergen/embedded"), show_default=True, help="the finished model"
)
@click.option(
    "--continue-from",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="a finished model; repeats the last round of its UNet and its LoRAs in a new folder",
)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
# With more threads some would have no share: a step has twelve crops, or eight of the largest latents.
@click.option("--threads", type=click.IntRange(1, 4), default=2, show_default=True)
def main(folder: Path, output: Path, continue_from: Path | None, device: str, threads: int) -> None:
    """Train text encoder, VAE, UNet and LoRAs, then assemble them; 97 minutes on two idle cores."""
    torch.set_num_threads(threads)
    if continue_from:
        unpack_model(continue_from, folder)
    # A finished part is never trained again, because the later parts depend on its exact weights.
    if not (folder / "text" / "text_encoder").exists():
        train_text_encoder(folder / "text", TEXT_STEPS, device)
    if not (folder / "vae" / "vae").exists():
        train_vae(folder / "vae", VAE_STEPS, device, threads)
    train_unet(folder / "unet", device, threads)
    train_loras(folder, device, threads)
    assemble(folder, output)


def train_loras(folder: Path, device: str, processes: int) -> None:
    """Train the LoRAs in parallel: each uses less than two cores, and they are independent."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (1,)) as pool:
        runs = [pool.submit(train_lora, name, folder, steps, device) for name, steps in LORA_STEPS.items()]
        for run in runs:
            run.result()


if __name__ == "__main__":
    if not ALLOCATOR.keys() <= os.environ.keys():  # read once, when the process starts
        os.execve(sys.executable, sys.orig_argv, os.environ | ALLOCATOR)
    main()
