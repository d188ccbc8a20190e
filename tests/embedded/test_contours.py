"""The measure of contours: rendered shapes are within its limits, and octagons and bent edges are not."""

import math

import pytest
import torch
from torch import Tensor

from scripts.train_embedded_model.contours import (
    GATES,
    colour_shares,
    contour,
    held_out_scenes,
    is_within,
    measure,
    relative_deviation,
    relative_range,
)
from scripts.train_embedded_model.render import coverage, render
from scripts.train_embedded_model.scenes import is_held_out

SIDE = 256
RADIUS = 66.0
ROWS, COLUMNS = torch.meshgrid(torch.arange(SIDE) + 0.5, torch.arange(SIDE) + 0.5, indexing="ij")
X, Y = COLUMNS - 121.3, ROWS - 130.6
ANGLES = torch.atan2(Y, X)


@pytest.mark.parametrize("shape", GATES)
def test_rendered_shapes_are_within_the_limits(shape: str) -> None:
    images = render(held_out_scenes(shape, 12), SIDE, SIDE)
    assert all(is_within(measure(shape, image)) for image in images)


def test_a_circle_measures_its_pixels_only() -> None:
    distance = torch.hypot(X, Y) - RADIUS
    smooth, hard = measure("circle", image_of(-distance)), measure("circle", image_of(-1000 * distance))
    assert smooth["deviation"] < 0.001
    assert smooth["range"] < 0.004
    assert hard["deviation"] == pytest.approx(0.004, abs=0.001)
    assert hard["range"] == pytest.approx(0.014, abs=0.003)


def test_an_octagon_is_not_round() -> None:
    sector = math.pi / 4
    turned = torch.remainder(ANGLES, sector) - sector / 2
    distance = torch.hypot(X, Y) * turned.cos() - RADIUS
    figures = measure("circle", image_of(-distance))
    assert figures["deviation"] == pytest.approx(0.023, abs=0.002)
    assert figures["range"] == pytest.approx(0.08, abs=0.005)
    assert not is_within(figures)


def test_the_inner_contour_of_a_ring_is_measured() -> None:
    dented = 32 + 2 * (3 * ANGLES).sin()
    radius = torch.hypot(X, Y)
    figures = measure("ring", image_of(torch.minimum(RADIUS - radius, radius - dented)))
    assert figures["deviation"] < 0.001
    assert figures["inner deviation"] == pytest.approx(2 / 32 / math.sqrt(2), abs=0.003)
    assert figures["inner range"] == pytest.approx(4 / 32, abs=0.01)


@pytest.mark.parametrize(("bend", "straight"), [(0.0, True), (1.0, True), (4.0, False)])
def test_a_bent_edge_is_not_straight(bend: float, straight: bool) -> None:
    """The right edge is an arc, `bend` pixels farther out in its middle than at its ends."""
    right = X + bend * (Y / 50) ** 2
    figures = measure("square", image_of(50 - torch.maximum(torch.maximum(right, -X), Y.abs())))
    assert is_within(figures) == straight


def test_the_contour_is_subpixel() -> None:
    """Moving a circle by a tenth of a pixel moves its contour by a tenth."""
    first, second = (
        contour(colour_shares(image_of(RADIUS - torch.hypot(X - shift, Y)))) for shift in (0.0, 0.1)
    )
    assert (second - first).mean(0).tolist() == pytest.approx([0.1, 0], abs=0.01)
    assert relative_deviation(first) < relative_range(first)


@pytest.mark.parametrize("shape", GATES)
def test_prompts_are_held_out(shape: str) -> None:
    scenes = held_out_scenes(shape)
    assert len(scenes) == 60
    assert all(is_held_out(shape, scene.kinds[0].colour, scene.background) for scene in scenes)


def image_of(distance_inside: Tensor) -> Tensor:
    """A red object on a blue background, from the distances of pixels to its contour."""
    red, blue = torch.tensor([0.7, -0.7, -0.7]), torch.tensor([-0.7, -0.4, 0.7])
    return torch.lerp(blue[:, None, None], red[:, None, None], coverage(distance_inside))
