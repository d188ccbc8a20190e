"""Measure how round and straight shapes are: python -m scripts.train_embedded_model.contours."""

import math
from itertools import islice, product
from pathlib import Path

import click
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor
from torch.nn import functional

from .captions import plain_caption
from .pipeline import generate
from .progress import image_grid
from .reading import background_of
from .scenes import COLOURS, Kind, Scene, Thing, is_held_out

SIDE = 256
IMAGES = 60  # of each shape
GATES = {"circle": 58, "ring": 58, "square": 54, "diamond": 54}  # of IMAGES
POLYGONS = ("square", "diamond")
# Of the outer contour, and of the inner one of a ring. Rendered circles have 0.001 and 0.003, without
# anti-aliasing 0.004 and 0.014; octagons have 0.023 and 0.08.
LIMITS = {
    "deviation": 0.009,
    "range": 0.035,
    "inner deviation": 0.009,
    "inner range": 0.035,
    "pixels from a polygon": 1.0,
}
CORNER = 6.0  # pixels around a polygon's corner that are not an edge
RAYS = 360
SAMPLES_PER_PIXEL = 4
LEAST_CONTRAST = 0.3  # an object's colour differs more from the background's, in -1..1
END_OF_EDGE = 0.15  # share of an edge's points at either end that is left out when a line is fitted


def colour_shares(image: Tensor) -> Tensor:
    """Each pixel's position between the colours of the background (0) and of the one object (1).

    Raises:
        ValueError: the image does not show an object.
    """
    from_background = image - background_of(image)[:, None, None]
    region = from_background.norm(dim=0) > LEAST_CONTRAST
    if not region.any():
        raise ValueError("The image does not show an object.")
    colour = from_background[:, region].median(dim=1).values
    return torch.einsum("chw,c->hw", from_background, colour) / colour.square().sum()


def contour(shares: Tensor, inner: bool = False) -> Tensor:
    """Points (x, y) in pixels where rays from the object's centre leave it: shape (RAYS, 2).

    With `inner`, the points where they enter it. A point lies where the linear interpolation of the pixels is
    half-way between the two colours.
    """
    height, width = shares.shape
    mask = shares.clamp(0, 1)
    mask = mask * (mask > 0.5)
    columns, rows = torch.arange(width) + 0.5, torch.arange(height) + 0.5
    centre = torch.stack([mask.sum(0) @ columns, mask.sum(1) @ rows]) / mask.sum()
    centre = crossings(shares, centre, inner).mean(0)  # of the contour rather than of the area
    return crossings(shares, centre, inner)


def crossings(shares: Tensor, centre: Tensor, inner: bool) -> Tensor:
    """The last points, or with `inner` the first, where rays from a centre cross the contour."""
    height, width = shares.shape
    angles = torch.arange(RAYS) * (2 * math.pi / RAYS)
    directions = torch.stack([angles.cos(), angles.sin()], dim=1)
    distances = torch.arange(0, min(height, width), 1 / SAMPLES_PER_PIXEL)
    points = centre + distances[:, None] * directions[:, None]
    grid = 2 * points / torch.tensor([width, height]) - 1
    # Outside the image there is background.
    along = functional.grid_sample(shares[None, None], grid[None], align_corners=False)[0, 0] - 0.5
    if inner:
        index = (along > 0).int().argmax(1).clamp_min(1) - 1
    else:
        index = len(distances) - 1 - (along > 0).flip(1).int().argmax(1)
        index = index.clamp_max(len(distances) - 2)
    rays = torch.arange(RAYS)
    before, after = along[rays, index], along[rays, index + 1]
    crossing = distances[index] + before / (before - after) / SAMPLES_PER_PIXEL
    return centre + crossing[:, None] * directions


def relative_deviation(points: Tensor) -> float:
    """The standard deviation of the points' distances from their centre, in mean distances."""
    distances = distances_from_centre(points)
    return float(distances.std() / distances.mean())


def relative_range(points: Tensor) -> float:
    """The difference of the largest and the smallest distance from the centre, in mean distances."""
    distances = distances_from_centre(points)
    return float((distances.max() - distances.min()) / distances.mean())


def distances_from_centre(points: Tensor) -> Tensor:
    return (points - points.mean(0)).norm(dim=1)


def distances_from_polygon(points: Tensor, corners: int = 4) -> Tensor:
    """The signed distances, in pixels, of a contour's points from the edges of a polygon fitted to them.

    Its first corner is the point farthest from the centre, and its edges are lines of least squares. Points
    near a corner are left out. Gradients do not pass through the fit.
    """
    fixed = points.detach()
    first = int(distances_from_centre(fixed).argmax())
    edges = fixed.roll(-first, 0).chunk(corners)
    lines = [fit_line(edge) for edge in edges]
    normals = torch.stack([normal for _, normal in lines])
    offsets = torch.stack([middle @ normal for middle, normal in lines])
    corner_points = torch.linalg.solve(
        torch.stack([normals, normals.roll(1, 0)], dim=1), torch.stack([offsets, offsets.roll(1)], dim=1)
    )
    from_lines = points @ normals.T - offsets
    nearest = from_lines.detach().abs().argmin(1, keepdim=True)
    is_on_edge = torch.cdist(fixed, corner_points).amin(1) > CORNER
    return from_lines.gather(1, nearest)[is_on_edge, 0]


def fit_line(points: Tensor) -> tuple[Tensor, Tensor]:
    """A point of the line of least squares through an edge without its ends, and its unit normal."""
    end = int(END_OF_EDGE * len(points))
    inside = points[end:-end]
    middle = inside.mean(0)
    return middle, torch.linalg.svd(inside - middle).Vh[1]


def held_out_scenes(shape: str, count: int = IMAGES) -> list[Scene]:
    """Single objects of one shape in held-out colours, each combination several times."""
    combinations = [
        (colour, background)
        for colour, background in product(COLOURS, COLOURS)
        if colour != background and is_held_out(shape, colour, background)
    ]
    scenes = [
        Scene(background, (Kind(shape, colour),), (Thing(Kind(shape, colour), 0.5, 0.5, 0.28, 0.0),))
        for colour, background in combinations
    ]
    return list(islice((scene for _ in range(count) for scene in scenes), count))


def measure(shape: str, image: Tensor) -> dict[str, float]:
    """The figures of the shape in one image, by the names of LIMITS."""
    shares = colour_shares(image)
    outer = contour(shares)
    if shape in POLYGONS:
        return {"pixels from a polygon": float(distances_from_polygon(outer).abs().max())}
    figures = {"deviation": relative_deviation(outer), "range": relative_range(outer)}
    if shape == "ring":
        inner = contour(shares, inner=True)
        figures |= {"inner deviation": relative_deviation(inner), "inner range": relative_range(inner)}
    return figures


def is_within(figures: dict[str, float]) -> bool:
    return all(value <= LIMITS[name] for name, value in figures.items())


@click.command()
@click.option("--model", type=Path, default=Path("hypergen/embedded"), show_default=True)
@click.option("--images", default=IMAGES, show_default=True, help="of each shape")
@click.option("--samples", type=Path, help="folder for the images, one file per shape")
def main(model: Path, images: int, samples: Path | None) -> None:
    """Generate single held-out objects at 256x256, and print how many are within the limits."""
    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    print("| | figure | median | largest | limit | within the limits | gate |\n|---|---|---|---|---|---|---|")
    for shape, gate in GATES.items():
        prompts = [plain_caption(scene) for scene in held_out_scenes(shape, images)]
        generated = generate(pipeline, prompts, SIDE, SIDE)
        measured = [measure(shape, image) for image in generated]
        within = f"{sum(is_within(figures) for figures in measured)} of {images}"
        for name in measured[0]:
            # A ring without an inner contour has no figures of it.
            values = torch.tensor([figures[name] for figures in measured]).nan_to_num(math.inf)
            print(
                f"| {shape} | {name} | {values.median():.4f} | {values.max():.4f} | {LIMITS[name]} "
                f"| {within} | {gate} of {IMAGES} |",
                flush=True,
            )
        if samples:
            samples.mkdir(parents=True, exist_ok=True)
            image_grid(generated, 10).save(samples / f"{shape}.png")


if __name__ == "__main__":
    main()
