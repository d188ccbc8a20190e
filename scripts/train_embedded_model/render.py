"""Render batches of scenes by signed distance functions."""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from .scenes import COLOURS, Scene, Thing

PALETTE = {name: torch.tensor(rgb) / 127.5 - 1 for name, rgb in COLOURS.items()}


def circle(x: Tensor, y: Tensor) -> Tensor:
    return torch.hypot(x, y) - 0.92


def square(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs(), y.abs()) - 0.8


def triangle(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(y - 0.75, (1.75 * x.abs() - 0.97 * (y + 1)) / math.hypot(1.75, 0.97))


def star(x: Tensor, y: Tensor) -> Tensor:
    """Fold the plane into one of ten sectors, in which the star is one straight edge."""
    sector = 2 * math.pi / 5
    angle = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    radius = torch.hypot(x, y)
    inner_x, inner_y = 0.42 * math.cos(sector / 2), 0.42 * math.sin(sector / 2)
    edge_x, edge_y = inner_x - 1, inner_y
    cross_product = (radius * torch.cos(angle) - 1) * edge_y - radius * torch.sin(angle) * edge_x
    return cross_product / math.hypot(edge_x, edge_y)


def diamond(x: Tensor, y: Tensor) -> Tensor:
    return (x.abs() / 0.68 + y.abs() - 1) * 0.56


def heart(x: Tensor, y: Tensor) -> Tensor:
    """Inigo Quilez' sdHeart (MIT), https://iquilezles.org/articles/distfunctions2d, in these units."""
    scale = 1.7
    x, y = x.abs() / scale, (0.92 - y) / scale
    lobe = torch.hypot(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    half = 0.5 * (x + y).clamp_min(0)
    tip = torch.minimum(x**2 + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2).sqrt() * torch.sign(x - y)
    return torch.where(x + y > 1, lobe, tip) * scale


def cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.3, y - 0.9), torch.maximum(x - 0.9, y - 0.3))


def ring(x: Tensor, y: Tensor) -> Tensor:
    return (torch.hypot(x, y) - 0.68).abs() - 0.24


def hexagon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(x.abs() * math.sqrt(0.75) + y.abs() * 0.5, y.abs()) - 0.8


def moon(x: Tensor, y: Tensor) -> Tensor:
    return torch.maximum(torch.hypot(x, y) - 0.95, 0.78 - torch.hypot(x - 0.45, y + 0.12))


# Distance to the outline in units of the radius, negative inside; x to the right, y down.
DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": circle,
    "square": square,
    "triangle": triangle,
    "star": star,
    "diamond": diamond,
    "heart": heart,
    "cross": cross,
    "ring": ring,
    "hexagon": hexagon,
    "moon": moon,
}


def render(scenes: list[Scene], height: int, width: int) -> Tensor:
    """Render scenes at height x width pixels: float32, shape (B, 3, height, width), in -1..1."""
    images = torch.stack([PALETTE[scene.background] for scene in scenes])[:, :, None, None]
    images = images.expand(-1, -1, height, width).clone()
    # Things of one layer, shape and style are rendered together; later layers cover earlier ones.
    scene_indices: dict[tuple[int, str, str], list[int]] = defaultdict(list)
    for index, scene in enumerate(scenes):
        for layer, thing in enumerate(scene.things):
            scene_indices[layer, thing.kind.shape, thing.kind.style].append(index)
    for (layer, shape, style), indices in scene_indices.items():
        things = [scenes[index].things[layer] for index in indices]
        mask, colour = render_things(things, shape, style, height, width)
        images[indices] = torch.lerp(images[indices], colour, mask)
    return images


def render_things(
    things: list[Thing], shape: str, style: str, height: int, width: int
) -> tuple[Tensor, Tensor]:
    """Coverage and colour of each pixel by things of one shape and style."""
    shorter_side = min(height, width)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    geometry = torch.tensor(
        [(thing.x * width, thing.y * height, thing.radius, thing.angle) for thing in things]
    )
    centre_x, centre_y, radius, angle = geometry[:, :, None, None].unbind(1)
    radius = radius * shorter_side
    x, y = x - centre_x, y - centre_y
    distance = DISTANCES[shape](*in_radii(x, y, radius, angle)) * radius
    if style == "outlined":
        half_width = (radius * 0.1).clamp(shorter_side / 80, shorter_side / 25)
        distance = (distance + half_width).abs() - half_width
    mask = coverage(-distance)[:, None]
    colour = torch.stack([PALETTE[thing.kind.colour] for thing in things])[:, :, None, None]
    if style in ("solid", "outlined"):
        return mask, colour
    # The second colour of a texture is white, except on white.
    second = torch.stack([PALETTE["black" if thing.kind.colour == "white" else "white"] for thing in things])
    return mask, torch.lerp(colour, second[:, :, None, None], texture(style, x, y, radius)[:, None])


def in_radii(x: Tensor, y: Tensor, radius: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Pixels from a thing's centre, as coordinates of its shape."""
    return (x * angle.cos() + y * angle.sin()) / radius, (y * angle.cos() - x * angle.sin()) / radius


def texture(style: str, x: Tensor, y: Tensor, radius: Tensor) -> Tensor:
    """The share of a textured thing's second colour at each pixel, 0..1."""
    if style == "gradient":
        return ((y / radius + 1) / 2).clamp(0, 1)
    period = (radius * 0.42).clamp_min(7)
    column = torch.remainder(x / period + 0.25, 1) - 0.5
    row = torch.remainder(y / period + 0.25, 1) - 0.5
    if style == "striped":
        diagonal = torch.remainder((x + y) * math.sqrt(0.5) / period + 0.25, 1) - 0.5
        return coverage((diagonal.abs() - 0.25) * period)
    if style == "dotted":
        return coverage((0.28 - torch.hypot(column, row)) * period)
    column, row = column.abs() - 0.25, row.abs() - 0.25
    return coverage(torch.sign(column * row) * torch.minimum(column.abs(), row.abs()) * period)


def coverage(distance_inside: Tensor) -> Tensor:
    """Anti-alias an edge over one pixel."""
    return (distance_inside + 0.5).clamp(0, 1)
