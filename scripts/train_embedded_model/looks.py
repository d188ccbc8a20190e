"""The looks of the LoRAs: how each is rendered for training, and how it is measured in an image.

A LoRA is trained on the UNet's training scenes, rendered in its look; the captions do not name the look.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .reading import region_areas
from .render import PALETTE, coverage, render
from .scenes import Scene

BLOCK = 1 / 16  # side of Pixel_Art's blocks in shorter sides, rounded to whole latents
FRAME = 0.07  # width of Logo's frame, in shorter sides
CORNER = 0.12  # radius of its inner corners, in shorter sides
DROPS = (36, 60)
DROP_RADII = (0.018, 0.05)  # in shorter sides
STROKE = 16  # pixels from one of Crayons' strokes to the next


@dataclass(frozen=True)
class Look:
    """A renderer of scenes in this look, and a measure of the look in an image of shape (3, H, W).

    The measure is at least `threshold` for images in the look, and lower for others.
    """

    render: Callable[[list[Scene], int, int, torch.Generator], Tensor]
    measure: Callable[[Tensor], float]
    threshold: float


def pixel_art(scenes: list[Scene], height: int, width: int, generator: torch.Generator) -> Tensor:
    """Large blocks, each in the colour of its middle."""
    del generator
    block = block_of(height, width)
    blocks = render(scenes, height, width)[..., block // 2 :: block, block // 2 :: block]
    blocks = blocks.repeat_interleave(block, -2).repeat_interleave(block, -1)
    missing = (0, max(0, width - blocks.shape[-1]), 0, max(0, height - blocks.shape[-2]))
    return functional.pad(blocks, missing, "replicate")[..., :height, :width]


def block_of(height: int, width: int) -> int:
    """The side of a block in pixels: 8 at 128x128, 16 at 256x256."""
    return 8 * max(1, round(BLOCK * min(height, width) / 8))


def share_of_edges_on_grid(image: Tensor) -> float:
    """The share of all differences between neighbouring pixels that is within a pixel of block borders."""
    block = block_of(*image.shape[1:])
    across, down = (image.diff(dim=dim).abs().sum(0) for dim in (2, 1))
    on_grid = at_borders(across, 1, block).sum() + at_borders(down, 0, block).sum()
    return float(on_grid / (across.sum() + down.sum() + 1e-6))


def at_borders(changes: Tensor, dim: int, block: int) -> Tensor:
    """The changes at most one pixel from a border of two blocks."""
    index = torch.arange(changes.shape[dim])
    return changes.index_select(dim, index[(index + 2) % block < 3])


def logo(scenes: list[Scene], height: int, width: int, generator: torch.Generator) -> Tensor:
    """The scene in a frame with round corners, in the colour of its first object."""
    del generator
    return framed(render(scenes, height, width), scenes)


def framed(images: Tensor, scenes: list[Scene]) -> Tensor:
    colours = torch.stack([PALETTE[scene.kinds[0].colour] for scene in scenes])[:, :, None, None]
    height, width = images.shape[2:]
    return torch.lerp(images, colours, coverage(inside_of_edge(height, width, FRAME).neg()))


def inside_of_edge(height: int, width: int, inset: float) -> Tensor:
    """Signed distance in pixels, positive inside, to a rounded rectangle `inset` from the edge."""
    shorter_side = min(height, width)
    radius = CORNER * shorter_side
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    beyond_x = (x - width / 2).abs() - (width / 2 - inset * shorter_side - radius)
    beyond_y = (y - height / 2).abs() - (height / 2 - inset * shorter_side - radius)
    outside = torch.hypot(beyond_x.clamp_min(0), beyond_y.clamp_min(0))
    return radius - outside - torch.maximum(beyond_x, beyond_y).clamp_max(0)


def share_of_frame(image: Tensor) -> float:
    """The share of the frame's middle line that is nearer to the frame's colour than to the background's."""
    height, width = image.shape[1:]
    line = inside_of_edge(height, width, FRAME / 2).abs() < 1
    colour, background = (pixels.median(dim=1).values for pixels in (image[:, line], inside_the_frame(image)))
    to_frame, to_background = ((image[:, line] - one[:, None]).norm(dim=0) for one in (colour, background))
    return float((to_frame < to_background).float().mean() * ((colour - background).norm() > 0.3))


def inside_the_frame(image: Tensor) -> Tensor:
    """The pixels, shape (3, N), of a line just inside the frame or its usual position: mostly background."""
    height, width = image.shape[1:]
    return image[:, inside_of_edge(height, width, FRAME + 0.025).abs() < 1]


def paint_splash(scenes: list[Scene], height: int, width: int, generator: torch.Generator) -> Tensor:
    """Drops in the objects' colours, all over the image."""
    images = render(scenes, height, width)
    shorter_side = min(height, width)
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for image, scene in zip(images, scenes, strict=True):
        count = int(torch.randint(*DROPS, (1,), generator=generator))
        samples = torch.rand(count, 3, generator=generator)
        radii = shorter_side * (DROP_RADII[0] + (DROP_RADII[1] - DROP_RADII[0]) * samples[:, 2] ** 2)
        centre_x, centre_y = (samples[:, :2] * torch.tensor([width, height]))[:, :, None, None].unbind(1)
        drops = coverage(radii[:, None, None] - torch.hypot(x - centre_x, y - centre_y))
        for number, kind in enumerate(scene.kinds):
            mask = drops[number :: len(scene.kinds)].amax(0)
            image.lerp_(PALETTE[kind.colour][:, None, None], mask)
    return images


def count_drops(image: Tensor) -> float:
    """The number of regions of drop size that differ from the background."""
    background = inside_the_frame(image).median(dim=1).values
    areas = region_areas((image - background[:, None, None]).norm(dim=0) > 0.5) / image[0].numel()
    return float(((areas > 0.0003) & (areas < 0.008)).sum())


def crayons(scenes: list[Scene], height: int, width: int, generator: torch.Generator) -> Tensor:
    """Slanted strokes with paper between them."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    phase = torch.rand(len(scenes), 1, 1, generator=generator)
    wobble = 0.12 * torch.sin((x - y) / 23 + 6.28 * phase)
    stroke = torch.remainder((x + y) / (STROKE * 2**0.5) + phase + wobble, 1) - 0.5
    paper = coverage((stroke.abs() - 0.36) * STROKE)[:, None]
    images = render(scenes, height, width)
    # White paper is visible between the strokes; between light ones it is darkened, for contrast.
    is_light = images.mean(1, keepdim=True) > 0.3
    between = torch.where(is_light, 0.45 * images - 0.55, 0.95)
    return torch.lerp(images, between, 0.85 * paper)


def stroke_contrast(image: Tensor) -> float:
    """The lower quartile of the standard deviation of brightness within patches of a stroke's width."""
    patch = STROKE
    patches = image.mean(0, keepdim=True).unfold(1, patch, patch // 2).unfold(2, patch, patch // 2)
    return float(patches.std((-2, -1)).flatten().quantile(0.25))


LOOKS = {
    "Pixel_Art": Look(pixel_art, share_of_edges_on_grid, 0.55),
    "Logo": Look(logo, share_of_frame, 0.75),
    "Paint_Splash": Look(paint_splash, count_drops, 6),
    "Crayons": Look(crayons, stroke_contrast, 0.1),
}
