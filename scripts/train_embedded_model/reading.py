"""Detect the background and the objects of an image, with their colours and shapes.

There is no learned model. The background is taken from the border. Objects are connected regions that differ
from it. Colours are the nearest ones of the palette, and shapes those of the ten outlines that overlap most.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .render import DISTANCES, PALETTE, coverage
from .scenes import LARGEST_ANGLE

# Colour distance in -1..1 from which a pixel is not background; the palette's colours are > 0.6 apart.
DIFFERENT = 0.35
SMALLEST_AREA = 0.005  # of the image; a fifth of the smallest object in the score's prompts
LEAST_OVERLAP = 0.75
GRID = 64
REACH = 1.25  # half the side of the grid for shapes, in square roots of the object's area


@dataclass(frozen=True)
class Blob:
    """A detected object. x and y are fractions of the image's sides; shape is "" if none matches."""

    colour: str
    shape: str
    x: float
    y: float


@dataclass(frozen=True)
class DetectedScene:
    background: str
    blobs: tuple[Blob, ...]


def detect_scene(image: Tensor) -> DetectedScene:
    """Detect background and objects in an image of shape (3, H, W) in -1..1."""
    background = background_of(image)
    regions = connected_regions((image - background[:, None, None]).norm(dim=0) > DIFFERENT)
    blobs = [describe_blob(image, background, region) for region in regions]
    return DetectedScene(nearest_colour(background), tuple(blobs))


def background_of(image: Tensor) -> Tensor:
    """The median colour of the border."""
    edge = max(1, image.shape[1] // 64)
    rows = torch.cat([image[:, :edge], image[:, -edge:]], dim=1).flatten(1)
    columns = torch.cat([image[..., :edge], image[..., -edge:]], dim=2).flatten(1)
    return torch.cat([rows, columns], dim=1).median(dim=1).values


def connected_regions(mask: Tensor) -> list[Tensor]:
    """The regions of a mask with at least the smallest area, each as a mask."""
    numbers = region_numbers(mask)
    unique_numbers, areas = numbers.unique(return_counts=True)
    large = unique_numbers[areas > SMALLEST_AREA * mask.numel()]
    return [torch.zeros_like(mask).masked_scatter(mask, numbers == number) for number in large]


def region_areas(mask: Tensor) -> Tensor:
    """The number of pixels in each region of a mask."""
    return region_numbers(mask).unique(return_counts=True)[1]


def region_numbers(mask: Tensor) -> Tensor:
    """A number for each pixel of a mask, the same for connected pixels.

    Pixels start with the number of their run within a row. Columns and rows alternately take the largest
    number in each of their runs, until nothing changes.
    """
    across, down = number_runs(mask), number_runs(mask.T).T
    numbers = across[mask]
    while True:
        before = numbers
        for runs in (down[mask], across[mask]):
            largest = torch.zeros(int(runs.max()) + 1 if len(runs) else 1, dtype=numbers.dtype)
            numbers = largest.scatter_reduce(0, runs, numbers, "amax")[runs]
        if torch.equal(numbers, before):
            return numbers


def number_runs(mask: Tensor) -> Tensor:
    """Number the runs of every row, each with a unique number; zero outside."""
    starts = mask.clone()
    starts[:, 1:] &= ~mask[:, :-1]
    return starts.flatten().cumsum(0).view(mask.shape) * mask


def describe_blob(image: Tensor, background: Tensor, region: Tensor) -> Blob:
    colour = image[:, region].median(dim=1).values
    # The position of each pixel between the colours of the background (0) and of the object (1).
    direction = colour - background
    share = torch.einsum("chw,c->hw", image - background[:, None, None], direction)
    share = share / direction.square().sum()
    soft_mask = share.clamp(0, 1) * region
    height, width = soft_mask.shape
    area = soft_mask.sum()
    x = (soft_mask.sum(0) * (torch.arange(width) + 0.5)).sum() / area
    y = (soft_mask.sum(1) * (torch.arange(height) + 0.5)).sum() / area
    centre = torch.stack([2 * x / width - 1, 2 * y / height - 1])
    scale = torch.tensor([2 / width, 2 / height]) * area.sqrt()
    sampled = functional.grid_sample(
        soft_mask[None, None], (centre + unit_grid() * scale)[None], align_corners=False, padding_mode="zeros"
    )[0, 0]
    names, outlines = shape_outlines()
    overlaps = torch.minimum(sampled, outlines).sum((1, 2)) / torch.maximum(sampled, outlines).sum((1, 2))
    shape = names[int(overlaps.argmax())] if overlaps.max() > LEAST_OVERLAP else ""
    return Blob(nearest_colour(colour), shape, float(x / width), float(y / height))


def nearest_colour(colour: Tensor) -> str:
    return min(PALETTE, key=lambda name: float((PALETTE[name] - colour).norm()))


def unit_grid() -> Tensor:
    """Points x, y of shape (GRID, GRID, 2), from -REACH to REACH."""
    line = torch.linspace(-REACH, REACH, GRID)
    y, x = torch.meshgrid(line, line, indexing="ij")
    return torch.stack([x, y], dim=-1)


@functools.cache
def shape_outlines() -> tuple[list[str], Tensor]:
    """Names and soft masks of every shape at the angles in scenes, with equal areas and centres."""
    angles = torch.linspace(-LARGEST_ANGLE, LARGEST_ANGLE, 5).tolist()
    pairs = [(shape, angle) for shape in DISTANCES for angle in angles]
    return [shape for shape, _ in pairs], torch.stack([outline(*pair) for pair in pairs])


def outline(shape: str, angle: float) -> Tensor:
    line = torch.linspace(-1.1, 1.1, 256)
    y, x = torch.meshgrid(line, line, indexing="ij")
    inside = DISTANCES[shape](x, y) < 0
    area = inside.float().mean() * 2.2**2
    grid = unit_grid() * area.sqrt()
    cos, sin = torch.tensor(angle).cos(), torch.tensor(angle).sin()
    turned = torch.stack(
        [grid[..., 0] * cos + grid[..., 1] * sin, grid[..., 1] * cos - grid[..., 0] * sin], dim=-1
    )
    centred_x, centred_y = turned[..., 0] + x[inside].mean(), turned[..., 1] + y[inside].mean()
    pixel = 2 * REACH * area.sqrt() / GRID
    return coverage(-DISTANCES[shape](centred_x, centred_y) / pixel)
