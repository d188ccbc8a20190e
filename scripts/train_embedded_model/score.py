"""Score the model on combinations it never saw: python -m scripts.train_embedded_model.score."""

import random
from pathlib import Path

import click
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from .captions import plain_caption
from .pipeline import draw
from .progress import image_grid
from .reading import Blob, Reading, read
from .scenes import Scene, group, is_held_out, pair, single

SEED = 4
COUNTED_FROM = 2
PROMPTS = {"single": 40, "group": 30, "pair": 30}
# The share that each verdict must reach before weights are shipped.
GATES = {"background": 0.97, "object colour": 0.97, "single, everything": 0.9, "group, count": 0.85}


def held_out_scenes(prompts: dict[str, int]) -> list[Scene]:
    """Different scenes of plain objects of the usual size, with no combination that training draws."""
    rng = random.Random(SEED)
    layouts = {"single": single, "group": group, "pair": pair}
    scenes: list[Scene] = []
    for layout, count in prompts.items():
        found: list[Scene] = []
        while len(found) < count:
            scene = layouts[layout](rng)
            is_turn = (
                layout != "group" or scene.count == COUNTED_FROM + len(found) % 3
            )  # two, three, four, two ...
            if is_wanted(scene) and is_turn and plain_caption(scene) not in map(plain_caption, found):
                found.append(scene)
        scenes += found
    return scenes


def is_wanted(scene: Scene) -> bool:
    plain = all(kind.style == "solid" and not kind.size for kind in scene.kinds) and not scene.position
    return plain and all(is_held_out(kind.shape, kind.colour, scene.background) for kind in scene.kinds)


def judge(scene: Scene, reading: Reading) -> dict[str, bool]:
    """What of the scene the picture shows, by the names of the score table's rows."""
    background = reading.background == scene.background
    counted = len(reading.blobs) == len(scene.things)
    if scene.relation:
        first, second = scene.kinds
        blobs = in_order(reading.blobs, scene.relation)
        coloured = counted and [blob.colour for blob in blobs] == [first.colour, second.colour]
        shaped = coloured and [blob.shape for blob in blobs] == [first.shape, second.shape]
        return {
            "background": background,
            "pair, colours placed": background and coloured,
            "pair, everything": background and shaped,
        }
    (kind,) = scene.kinds
    coloured = bool(reading.blobs) and all(blob.colour == kind.colour for blob in reading.blobs)
    shaped = bool(reading.blobs) and all(blob.shape == kind.shape for blob in reading.blobs)
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
    """The share of pictures for which each verdict is true, of those that it applies to."""
    verdicts = [judge(scene, read(image)) for scene, image in zip(scenes, images, strict=True)]
    rows = dict.fromkeys(row for verdict in verdicts for row in verdict)
    return {row: mean([verdict[row] for verdict in verdicts if row in verdict]) for row in rows}


def mean(values: list[bool]) -> float:
    return sum(values) / len(values)


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option(
    "--size", type=int, multiple=True, default=(256, 128), show_default=True, help="pixels of each side"
)
@click.option("--samples", type=Path, help="a folder for the pictures, in the order of the prompts")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
def main(model: Path, size: tuple[int, ...], samples: Path | None, device: str) -> None:
    """Draw a hundred held-out prompts at each size, 20 steps, guidance 4, and print the table."""
    scenes = held_out_scenes(PROMPTS)
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32).to(device)
    tables: dict[int, dict[str, float]] = {}
    for side in size:
        images = draw(pipeline, [plain_caption(scene) for scene in scenes], side, side)
        tables[side] = score(scenes, images)
        if samples:
            samples.mkdir(parents=True, exist_ok=True)
            image_grid(images, 10).save(samples / f"{side}.png")
    print("| |" + "".join(f" {side}x{side} |" for side in size) + " gate |")
    print("|---|" + "---|" * (len(size) + 1))
    for row in tables[size[0]]:
        gate = f"{GATES[row]:.2f}" if row in GATES else ""
        print(f"| {row} |" + "".join(f" {table[row]:.2f} |" for table in tables.values()) + f" {gate} |")
    passed = all(table[row] >= gate for table in tables.values() for row, gate in GATES.items())
    print("All gates are met." if passed else "Some gates are missed.")


if __name__ == "__main__":
    main()
