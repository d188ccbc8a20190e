"""Measure what the prompt's score does not: python -m scripts.train_embedded_model.features.

Sizes, wording, seeds, guidance, negative prompts, picture-to-picture, time.
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
from .pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, draw
from .reading import read
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
    """Heights and widths up to the native area as the server draws them: do colour, background and number
    hold?
    """
    scenes = held_out_scenes({"single": 20, "group": 15})
    print_header("height x width", "background", "object colour", "count", "single, everything")
    for height, width in SIZES:
        images = draw_as_served(pipeline, captions(scenes), height, width)
        table = score(scenes, images)
        counted = mean([len(read(i).blobs) == s.count for s, i in zip(scenes, images, strict=True)])
        shares = table["background"], table["object colour"], counted, table["single, everything"]
        print_row(f"{height}x{width}", *shares)


def large(pipeline: StableDiffusionPipeline) -> None:
    """1024x1024 as the server draws it: at the nearest native size, then enlarged."""
    scenes = held_out_scenes({"single": 50})
    images = draw_as_served(pipeline, captions(scenes), LARGE, LARGE)
    right = score(scenes, images)["single, everything"]
    started = time.monotonic()
    draw_as_served(pipeline, captions(scenes[:1]), LARGE, LARGE)
    taken = time.monotonic() - started
    print(f"\n{LARGE}x{LARGE}: {right:.2f} of {len(scenes)} single objects right, {taken:.1f} s each")


def draw_as_served(pipeline: StableDiffusionPipeline, prompts: list[str], height: int, width: int) -> Tensor:
    """Draw at the size that the model's card chooses for one, and bring the pictures to that one."""
    model_card = json.loads(CARD.read_text())
    drawn_width, drawn_height = choose_generation_size(
        width, height, 8, model_card["max_native_area"], model_card["min_native_side"]
    )
    images = draw(pipeline, prompts, drawn_height, drawn_width)
    return torch.stack(
        [to_tensor(resize_to_request_size(to_picture(image), (width, height))) for image in images]
    )


def to_picture(image: Tensor) -> Image.Image:
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())


def to_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


def wording(pipeline: StableDiffusionPipeline) -> None:
    """Capitals, and other words around the subject."""
    scenes = held_out_scenes({"single": 30, "group": 15, "pair": 15})
    ways: dict[str, Callable[[str], str]] = {
        "as it is": str,
        "in capitals": str.upper,
        "A photo of ..., high quality": lambda text: f"A photo of {text}, high quality",
        "..., masterpiece, trending, 8k": lambda text: f"{text}, masterpiece, trending, 8k",
    }
    print_header("wording, 128x128", "single, everything", "group, everything", "pair, everything")
    for name, say in ways.items():
        table = score(scenes, draw(pipeline, [say(text) for text in captions(scenes)], 128, 128))
        print_row(name, *(table[f"{layout}, everything"] for layout in ("single", "group", "pair")))


def guidance(pipeline: StableDiffusionPipeline) -> None:
    scenes = held_out_scenes({"single": 40})
    print_header("guidance, 128x128", "object colour", "single, everything")
    for scale in GUIDANCE_SCALES:
        table = score(scenes, draw(pipeline, captions(scenes), 128, 128, guidance_scale=scale))
        print_row(f"{scale:g}", table["object colour"], table["single, everything"])


def seeds(pipeline: StableDiffusionPipeline) -> None:
    """How far pictures of one prompt and different seeds are apart, as a share of the range of a colour; and
    rendered pictures of scenes as training draws them, which the model can surpass by little.
    """
    print_header("pictures of one prompt", "mean difference between seeds")
    scenes = held_out_scenes({"single": 16})
    rng = random.Random(0)
    trained = [
        scene
        for scene in (single(rng, OVERLAPPING) for _ in range(100))
        if scene.stands_anywhere and not scene.kinds[0].size
    ]
    rendered = [render(rng.choices(possible_scenes(s), k=4), 128, 128) for s in trained]
    print_row("rendered", mean_difference(rendered))
    for side, count, scale in ((128, 16, 1.0), (128, 16, 2.0), (128, 16, 4.0), (256, 6, 4.0)):
        pictures = [
            draw(pipeline, [prompt] * 4, side, side, guidance_scale=scale)
            for prompt in captions(scenes[:count])
        ]
        print_row(f"{side}x{side}, guidance {scale:g}", mean_difference(pictures))


def mean_difference(pictures: list[Tensor]) -> float:
    """Between all pictures of one prompt, over all prompts; 1 is from black to white."""
    differences = [
        (one - other).abs().mean() / 2
        for images in pictures
        for index, one in enumerate(images)
        for other in images[:index]
    ]
    return float(torch.stack(differences).mean())


def negative(pipeline: StableDiffusionPipeline) -> None:
    """Name in the negative prompt the colour that a seed chose by itself: does it go?"""
    prompt = "a large shape on a white background"
    seeds = list(range(NEGATIVE_SEEDS))
    before = [colours(image) for image in draw(pipeline, [prompt] * len(seeds), 128, 128, seeds=seeds)]
    named = [next(iter(sorted(found)), "red") for found in before]
    after = draw(pipeline, [prompt] * len(seeds), 128, 128, negative_prompts=named, seeds=seeds)
    gone = [name not in colours(image) for name, image in zip(named, after, strict=True)]
    print(f"\nNegative prompt: the named colour is gone in {sum(gone)} of {len(gone)} seeds")


def colours(image: Tensor) -> set[str]:
    return {blob.colour for blob in read(image).blobs}


def strength(pipeline: StableDiffusionPipeline) -> None:
    """How far picture-to-picture goes from its picture."""
    scenes = held_out_scenes({"single": 8})
    start = (render(scenes, 128, 128) + 1) / 2
    edit = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    edit.set_progress_bar_config(disable=True)
    prompts = captions(scenes[1:] + scenes[:1])
    print_header("strength, 128x128", "mean difference from the picture")
    for value in STRENGTHS:
        drawn = edit(
            prompts,
            image=start,
            strength=value,
            num_inference_steps=NUM_INFERENCE_STEPS,
            guidance_scale=GUIDANCE_SCALE,
            generator=[torch.Generator().manual_seed(index) for index in range(len(prompts))],
            output_type="pt",
        )
        assert isinstance(drawn, StableDiffusionPipelineOutput)
        print(
            f"| {value:g} | {float((torch.as_tensor(drawn.images) - start).abs().mean()):.3f} |", flush=True
        )


def seconds(pipeline: StableDiffusionPipeline) -> None:
    for side in (128, 256):
        times = []
        for _ in range(3):
            started = time.monotonic()
            draw(pipeline, ["a red circle on a blue background"], side, side)
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
    "--only", type=click.Choice(list(MEASURES)), multiple=True, help="what to measure  [default: all]"
)
def main(model: Path, only: tuple[str, ...]) -> None:
    """Measure the model's features on held-out prompts, 20 steps, guidance 4, and print a table of each."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    for name in only or MEASURES:
        MEASURES[name](pipeline)


if __name__ == "__main__":
    main()
