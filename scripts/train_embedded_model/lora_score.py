"""Measure the LoRAs on held-out prompts: python -m scripts.train_embedded_model.lora_score."""

from pathlib import Path

import click
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from .captions import plain_caption
from .features import print_header, print_row
from .looks import LOOKS
from .pipeline import generate
from .progress import image_grid
from .reading import nearest_colour
from .scenes import Scene
from .score import held_out_scenes, mean

PROMPTS = {"single": 30, "group": 10, "pair": 10}
# LoRA -> scale. With scale 1 each, Paint_Splash and Logo show drops in only 0.4 of the images.
MIXES = (
    {"Pixel_Art": 1.0, "Logo": 1.0},
    {"Paint_Splash": 1.0, "Crayons": 1.0},
    {"Paint_Splash": 1.3, "Logo": 0.8},
    {"Crayons": 1.0, "Logo": 1.0},
    {"Crayons": 0.7, "Logo": 1.2},
)
GATE = 0.9


def load_loras(pipeline: StableDiffusionPipeline, folder: Path) -> None:
    for name in LOOKS:
        pipeline.load_lora_weights(str(folder), weight_name=f"{name}.safetensors", adapter_name=name)


def shows(name: str, images: Tensor) -> float:
    """The share of images that have a look."""
    look = LOOKS[name]
    return mean([look.measure(image) >= look.threshold for image in images])


def share_with_prompt_colours(scenes: list[Scene], images: Tensor) -> float:
    """The share of images with every colour of their prompt in at least one of 200 pixels."""
    return mean(
        [prompt_colours(scene) <= large_colours(image) for scene, image in zip(scenes, images, strict=True)]
    )


def prompt_colours(scene: Scene) -> set[str]:
    return {scene.background, *(kind.colour for kind in scene.kinds)}


def large_colours(image: Tensor) -> set[str]:
    pixels = image[:, ::4, ::4].flatten(1).T
    names = [nearest_colour(pixel) for pixel in pixels]
    return {name for name in names if names.count(name) >= len(names) / 200}


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option("--size", type=int, default=256, show_default=True, help="pixels of each side")
@click.option("--samples", type=Path, help="folder for the images, one file per LoRA")
def main(model: Path, size: int, samples: Path | None) -> None:
    """Generate fifty prompts with each LoRA and with two at once, and print the share that has the look."""
    scenes = held_out_scenes(PROMPTS)
    prompts = [plain_caption(scene) for scene in scenes]
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    plain = generate(pipeline, prompts, size, size)
    load_loras(pipeline, model / "loras")
    print_header("LoRA", "has the look", "without the LoRA", "has the prompt's colours")
    for name in LOOKS:
        pipeline.set_adapters([name], [1.0])
        images = generate(pipeline, prompts, size, size)
        print_row(name, shows(name, images), shows(name, plain), share_with_prompt_colours(scenes, images))
        if samples:
            samples.mkdir(parents=True, exist_ok=True)
            image_grid(images, 10).save(samples / f"{name}.png")
    few = prompts[::5]
    print_header("two LoRAs", "has the first look", "has the second")
    for scales in MIXES:
        pipeline.set_adapters(list(scales), list(scales.values()))
        images = generate(pipeline, few, size, size)
        label = " + ".join(f"{name} at {scale:g}" for name, scale in scales.items())
        print_row(label, *(shows(name, images) for name in scales))
    pipeline.set_adapters(list(LOOKS), [0.0] * len(LOOKS))
    same = torch.equal(generate(pipeline, few, size, size), generate_without_loras(model, few, size))
    print(f"\nAt scale 0 the images are {'bit-exact' if same else 'NOT bit-exact'}.")


def generate_without_loras(model: Path, prompts: list[str], size: int) -> Tensor:
    return generate(StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32), prompts, size, size)


if __name__ == "__main__":
    main()
