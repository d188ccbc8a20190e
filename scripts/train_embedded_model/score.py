"""Score the model on held-out combinations: python -m scripts.train_embedded_model.score."""

import random
import time
from pathlib import Path

import click
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from .captions import plain_caption
from .pipeline import GUIDANCE_SCALE, NUM_INFERENCE_STEPS, generate
from .progress import image_grid
from .reading import Blob, DetectedScene, detect_scene
from .render import render
from .scenes import Scene, group, is_held_out, pair, single

SEED = 4
COUNTED_FROM = 2
PROMPTS = {"single": 90, "group": 60, "pair": 60}
FEW_STEPS, FEW_STEPS_GUIDANCE = 4, 2.0
# Minimum share of each verdict for weights to be shipped.
GATES = {
    "background": 0.99,
    "object colour": 0.98,
    "single, everything": 0.97,
    "group, count": 0.95,
    "group, everything": 0.85,
    "pair, colours placed": 0.92,
    "pair, everything": 0.8,
}
FEW_STEPS_GATE = 0.9


def held_out_scenes(prompts: dict[str, int]) -> list[Scene]:
    """Different scenes of plain objects of the usual size, with held-out combinations only."""
    rng = random.Random(SEED)
    layouts = {"single": single, "group": group, "pair": pair}
    scenes: list[Scene] = []
    for layout, count in prompts.items():
        found: list[Scene] = []
        while len(found) < count:
            scene = layouts[layout](rng)
            # Counts in groups alternate: two, three, four, two ...
            has_next_count = layout != "group" or scene.count == COUNTED_FROM + len(found) % 3
            is_candidate = has_next_count and is_plain_and_held_out(scene)
            if is_candidate and plain_caption(scene) not in map(plain_caption, found):
                found.append(scene)
        scenes += found
    return scenes


def is_plain_and_held_out(scene: Scene) -> bool:
    plain = all(kind.style == "solid" and not kind.size for kind in scene.kinds) and not scene.position
    return plain and all(is_held_out(kind.shape, kind.colour, scene.background) for kind in scene.kinds)


def judge(scene: Scene, detected: DetectedScene) -> dict[str, bool]:
    """Verdicts about an image, by the row names of the score table."""
    background = detected.background == scene.background
    counted = len(detected.blobs) == len(scene.things)
    if scene.relation:
        first, second = scene.kinds
        blobs = in_order(detected.blobs, scene.relation)
        coloured = counted and [blob.colour for blob in blobs] == [first.colour, second.colour]
        shaped = coloured and [blob.shape for blob in blobs] == [first.shape, second.shape]
        return {
            "background": background,
            "pair, colours placed": background and coloured,
            "pair, everything": background and shaped,
        }
    (kind,) = scene.kinds
    coloured = bool(detected.blobs) and all(blob.colour == kind.colour for blob in detected.blobs)
    shaped = bool(detected.blobs) and all(blob.shape == kind.shape for blob in detected.blobs)
    everything = background and counted and coloured and shaped
    verdicts = {"background": background, "object colour": coloured}
    if scene.count < COUNTED_FROM:
        return verdicts | {"single, shape": shaped, "single, everything": everything}
    return verdicts | {"group, count": counted, "group, everything": everything}


def in_order(blobs: tuple[Blob, ...], relation: str) -> list[Blob]:
    """Blobs in the order in which the caption names them."""
    if relation in ("above", "below"):
        return sorted(blobs, key=lambda blob: blob.y, reverse=relation == "below")
    return sorted(blobs, key=lambda blob: blob.x, reverse=relation == "right")


def score(scenes: list[Scene], images: Tensor) -> dict[str, float]:
    """The share of images for which each verdict is true, among those it applies to."""
    verdicts = [judge(scene, detect_scene(image)) for scene, image in zip(scenes, images, strict=True)]
    rows = dict.fromkeys(row for verdict in verdicts for row in verdict)
    return {row: mean([verdict[row] for verdict in verdicts if row in verdict]) for row in rows}


def mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def wrong_scenes(scenes: list[Scene]) -> list[Scene]:
    """For each scene another one with the same layout and different objects and background."""
    return [next(other for other in scenes if differ(scene, other)) for scene in scenes]


def differ(first: Scene, second: Scene) -> bool:
    kinds = zip(first.kinds, second.kinds, strict=False)
    return (
        len(first.kinds) == len(second.kinds)
        and (first.count > 1) == (second.count > 1)
        and first.background != second.background
        and (first.count != second.count or first.count == 1)
        and all(one.colour != other.colour and one.shape != other.shape for one, other in kinds)
    )


def few_steps_row(guidance_scale: float) -> str:
    return f"single, everything, {FEW_STEPS} steps, guidance {guidance_scale:g}"


def print_table(columns: dict[str, dict[str, float]], gates: dict[str, float]) -> None:
    """Print a Markdown table with the gate of each row."""
    print("| |" + "".join(f" {name} |" for name in columns) + " gate |")
    print("|---|" + "---|" * (len(columns) + 1))
    for row in next(iter(columns.values())):
        values = "".join(f" {column[row]:.2f} |" for column in columns.values())
        print(f"| {row} |{values} {gates[row]:.2f} |" if row in gates else f"| {row} |{values}  |")
    missed = [
        f"{row} at {name}"
        for name, column in columns.items()
        for row, gate in gates.items()
        if column[row] < gate
    ]
    print(f"Missed: {', '.join(missed)}." if missed else "All gates are met.")


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option(
    "--size", type=int, multiple=True, default=(256, 128), show_default=True, help="pixels of each side"
)
@click.option("--first-seed", default=0, show_default=True, help="of the first prompt; the next has the next")
@click.option("--samples", type=Path, help="folder for the images, in the order of the prompts")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(model: Path, size: tuple[int, ...], first_seed: int, samples: Path | None, device: str) -> None:
    """Generate two hundred held-out prompts at each size, single objects also in few steps, and print the
    table."""
    scenes = held_out_scenes(PROMPTS)
    singles = scenes[: PROMPTS["single"]]
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    seeds = list(range(first_seed, first_seed + len(scenes)))
    columns: dict[str, dict[str, float]] = {}
    for side in size:
        started = time.monotonic()
        images = generate(pipeline, [plain_caption(scene) for scene in scenes], side, side, seeds=seeds)
        column = score(scenes, images)
        for guidance_scale in (FEW_STEPS_GUIDANCE, GUIDANCE_SCALE):
            quick = generate(
                pipeline,
                [plain_caption(scene) for scene in singles],
                side,
                side,
                num_inference_steps=FEW_STEPS,
                guidance_scale=guidance_scale,
                seeds=seeds[: len(singles)],
            )
            column[few_steps_row(guidance_scale)] = score(singles, quick)["single, everything"]
        columns[f"{side}x{side}"] = column
        print(f"{side}x{side}: {time.monotonic() - started:.0f} s", flush=True)
        if samples:
            samples.mkdir(parents=True, exist_ok=True)
            image_grid(images, 15).save(samples / f"{side}.png")
    print(f"{len(scenes)} prompts; by default {NUM_INFERENCE_STEPS} steps, guidance {GUIDANCE_SCALE:g}\n")
    print_table(columns, GATES | {few_steps_row(FEW_STEPS_GUIDANCE): FEW_STEPS_GATE})
    print_detector_check(scenes, size)


def print_detector_check(scenes: list[Scene], sizes: tuple[int, ...]) -> None:
    """Print the score of rendered images with their own captions and with wrong ones."""
    rendered = [render(scenes, side, side) for side in sizes]
    right, wrong = (
        [share for images in rendered for share in score(expected, images).values()]
        for expected in (scenes, wrong_scenes(scenes))
    )
    print(f"Rendered images score at least {min(right):.2f}, with wrong captions at most {max(wrong):.2f}.")


if __name__ == "__main__":
    main()
