"""Measure features that `score` does not cover: python -m scripts.train_embedded_model.features.

Sizes, wording, seeds, guidance, negative prompts, image to image, time.
"""

import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import click
import numpy as np
import torch
from diffusers.pipelines.stable_diffusion.pipeline_output import StableDiffusionPipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import (
    StableDiffusionImg2ImgPipeline,
)
from PIL import Image
from torch import Tensor

from hypergen.images.geometry import resize_to_request_size
from hypergen.models.resolution import choose_generation_size

from .captions import plain_caption
from .pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, generate
from .reading import detect_scene
from .render import render
from .scenes import OVERLAPPING, Scene, possible_scenes, single
from .score import held_out_scenes, mean, score

CARD = Path("hypergen/embedded/hypergen.json")
SIZES = ((64, 64), (64, 128), (128, 64), (96, 96), (96, 160), (192, 128), (144, 208), (256, 192), (240, 272))
LARGE = 1024
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)
GUIDANCE_SCALES = (1.0, 2.0, 4.0, 7.0)
NEGATIVE_SEEDS = 32


def sizes(pipeline: StableDiffusionPipeline) -> None:
    """Colour, background and count at sizes up to the native area, generated as by the server."""
    scenes = held_out_scenes({"single": 20, "group": 15})
    print_header("height x width", "background", "object colour", "count", "single, everything")
    for height, width in SIZES:
        images = generate_as_served(pipeline, captions(scenes), height, width)
        table = score(scenes, images)
        counted = mean([len(detect_scene(i).blobs) == s.count for s, i in zip(scenes, images, strict=True)])
        shares = table["background"], table["object colour"], counted, table["single, everything"]
        print_row(f"{height}x{width}", *shares)


def large(pipeline: StableDiffusionPipeline) -> None:
    """1024x1024 as by the server: generated at the nearest native size, then enlarged."""
    scenes = held_out_scenes({"single": 50})
    images = generate_as_served(pipeline, captions(scenes), LARGE, LARGE)
    right = score(scenes, images)["single, everything"]
    started = time.monotonic()
    generate_as_served(pipeline, captions(scenes[:1]), LARGE, LARGE)
    taken = time.monotonic() - started
    print(f"\n{LARGE}x{LARGE}: {right:.2f} of {len(scenes)} single objects right, {taken:.1f} s each")


def generate_as_served(
    pipeline: StableDiffusionPipeline, prompts: list[str], height: int, width: int
) -> Tensor:
    """Generate at the size that the model card determines for this request size, then resize to it."""
    model_card = json.loads(CARD.read_text())
    generation_width, generation_height = choose_generation_size(
        width, height, 8, model_card["max_native_area"], model_card["min_native_side"]
    )
    images = generate(pipeline, prompts, generation_height, generation_width)
    return torch.stack(
        [to_tensor(resize_to_request_size(to_pillow(image), (width, height))) for image in images]
    )


def to_pillow(image: Tensor) -> Image.Image:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1


def wording(pipeline: StableDiffusionPipeline) -> None:
    """Capitals, and other words around the subject."""
    scenes = held_out_scenes({"single": 30, "group": 15, "pair": 15})
    variants: dict[str, Callable[[str], str]] = {
        "as it is": str,
        "in capitals": str.upper,
        "A photo of ..., high quality": lambda text: f"A photo of {text}, high quality",
        "..., masterpiece, trending, 8k": lambda text: f"{text}, masterpiece, trending, 8k",
    }
    print_header("wording, 128x128", "single, everything", "group, everything", "pair, everything")
    for name, reword in variants.items():
        table = score(scenes, generate(pipeline, [reword(text) for text in captions(scenes)], 128, 128))
        print_row(name, *(table[f"{layout}, everything"] for layout in ("single", "group", "pair")))


def guidance(pipeline: StableDiffusionPipeline) -> None:
    scenes = held_out_scenes({"single": 40})
    print_header("guidance, 128x128", "object colour", "single, everything")
    for scale in GUIDANCE_SCALES:
        table = score(scenes, generate(pipeline, captions(scenes), 128, 128, guidance_scale=scale))
        print_row(f"{scale:g}", table["object colour"], table["single, everything"])


def seeds(pipeline: StableDiffusionPipeline) -> None:
    """The mean difference between images of one prompt and different seeds, as a share of the colour range.

    For comparison also that of rendered training scenes, which the model can hardly exceed.
    """
    print_header("images of one prompt", "mean difference between seeds")
    scenes = held_out_scenes({"single": 16})
    rng = random.Random(0)
    trained = [
        scene
        for scene in (single(rng, OVERLAPPING) for _ in range(100))
        if scene.has_open_position and not scene.kinds[0].size
    ]
    rendered = [render(rng.choices(possible_scenes(s), k=4), 128, 128) for s in trained]
    print_row("rendered", mean_difference(rendered))
    for side, count, scale in ((128, 16, 1.0), (128, 16, 2.0), (128, 16, 4.0), (256, 6, 4.0)):
        batches = [
            generate(pipeline, [prompt] * 4, side, side, guidance_scale=scale)
            for prompt in captions(scenes[:count])
        ]
        print_row(f"{side}x{side}, guidance {scale:g}", mean_difference(batches))


def mean_difference(batches: list[Tensor]) -> float:
    """The mean difference between images of the same batch, over all batches; black to white is 1."""
    differences = [
        (one - other).abs().mean() / 2
        for images in batches
        for index, one in enumerate(images)
        for other in images[:index]
    ]
    return float(torch.stack(differences).mean())


def negative(pipeline: StableDiffusionPipeline) -> None:
    """Use the colour that a seed chooses without one in the prompt as negative prompt: does it disappear?"""
    prompt = "a large shape on a white background"
    seeds = list(range(NEGATIVE_SEEDS))
    before = [colours(image) for image in generate(pipeline, [prompt] * len(seeds), 128, 128, seeds=seeds)]
    negative_prompts = [next(iter(sorted(found)), "red") for found in before]
    after = generate(
        pipeline, [prompt] * len(seeds), 128, 128, negative_prompts=negative_prompts, seeds=seeds
    )
    is_absent = [name not in colours(image) for name, image in zip(negative_prompts, after, strict=True)]
    print(f"\nNegative prompt: its colour is absent for {sum(is_absent)} of {len(is_absent)} seeds")


def colours(image: Tensor) -> set[str]:
    return {blob.colour for blob in detect_scene(image).blobs}


def strength(pipeline: StableDiffusionPipeline) -> None:
    """The difference between input image and result of image to image, by strength."""
    scenes = held_out_scenes({"single": 8})
    start = (render(scenes, 128, 128) + 1) / 2
    edit = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    edit.set_progress_bar_config(disable=True)
    prompts = captions(scenes[1:] + scenes[:1])
    print_header("strength, 128x128", "mean difference from the input image")
    for value in STRENGTHS:
        output = edit(
            prompts,
            image=start,
            strength=value,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
            output_type="pt",
        )
        assert isinstance(output, StableDiffusionPipelineOutput)
        difference = (torch.as_tensor(output.images) - start).abs().mean()
        print(f"| {value:g} | {float(difference):.3f} |", flush=True)


def seconds(pipeline: StableDiffusionPipeline) -> None:
    for side in (128, 256):
        times = []
        for _ in range(3):
            started = time.monotonic()
            generate(pipeline, ["a red circle on a blue background"], side, side)
            times.append(time.monotonic() - started)
        print(f"\n{side}x{side}: {min(times):.2f} s, {torch.get_num_threads()} threads")


def print_header(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|" + "---|" * len(columns))


def print_row(name: str, *values: float) -> None:
    print(f"| {name} |" + "".join(f" {value:.3f} |" for value in values), flush=True)


def captions(scenes: list[Scene]) -> list[str]:
    return [plain_caption(scene) for scene in scenes]


MEASURES: dict[str, Callable[[StableDiffusionPipeline], None]] = {
    "sizes": sizes,
    "large": large,
    "wording": wording,
    "guidance": guidance,
    "seeds": seeds,
    "negative": negative,
    "strength": strength,
    "seconds": seconds,
}


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option(
    "--only", type=click.Choice(list(MEASURES)), multiple=True, help="features to measure  [default: all]"
)
def main(model: Path, only: tuple[str, ...]) -> None:
    """Measure the model's features on held-out prompts, 20 steps, guidance 4, and print a table for each."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    for name in only or MEASURES:
        MEASURES[name](pipeline)


if __name__ == "__main__":
    main()
