"""How far a decoded image of one object is from a rendered one, with gradients: losses of `straighten`."""

from dataclasses import replace

import torch
from torch import Tensor

from .contours import (
    CORNER,
    POLYGONS,
    colour_shares,
    contour,
    distances_from_centre,
    distances_from_polygon,
)
from .render import DISTANCES, in_radii, render
from .scenes import Scene, Thing

# Of the shapes in render.py, in radii.
CORNERS = {
    "square": ((0.8, 0.8), (0.8, -0.8), (-0.8, 0.8), (-0.8, -0.8)),
    "diamond": ((0.68, 0.0), (-0.68, 0.0), (0.0, 1.0), (0.0, -1.0)),
}
RADIUS = 1.3  # of a square or diamond, in mean distances of its contour from its centre; about
ROUND_RADIUS = 1 / 0.92  # of a circle or ring
# Other geometries are no fit: shares of the shorter side, and radians.
LEAST_RADIUS, MOST_RADIUS, MOST_ANGLE = 0.12, 0.43, 0.3
FIT_STEPS = 10
# Of the fitted position and radius, in pixels, and angle: differences for derivatives, and largest steps.
DIFFERENCES, MOST_STEPS = (0.01, 0.01, 0.01, 1e-4), (8.0, 8.0, 8.0, 0.1)
FAR = 0.15  # in mean distances: such a contour is of another shape, and a polygon fitted to it says nothing
# The mean of a high power is near the largest bend, which the gates limit.
POWER, POWER_WEIGHT = 8, 0.5


def shape_losses(scene: Scene, image: Tensor) -> tuple[Tensor, Tensor]:
    """The mean difference from the rendered image of a scene, with the object where it is in the image, and
    how bent its contours are, in mean distances from their centres.

    Both contours of a ring are compared with circles, and the contour of a square or diamond with that shape,
    and with the polygon of the gates if it is near one.

    Args:
        scene: of one object.
        image: float, shape (3, H, W), in -1..1.

    Raises:
        ValueError: the image does not show the object.
    """
    (kind,) = scene.kinds
    shares = colour_shares(image)
    contours = [contour(shares, inner) for inner in ((False, True) if kind.shape == "ring" else (False,))]
    if not all(points.isfinite().all() for points in contours):
        raise ValueError("The image does not show the object.")
    with torch.no_grad():
        geometry = geometry_of(kind.shape, contours[0])
        rendered = render([at_geometry(scene, geometry, *image.shape[1:])], *image.shape[1:])[0]
    bends = [bend for points in contours for bend in bends_of(kind.shape, points, geometry)]
    return (image - rendered).abs().mean(), torch.stack(list(map(bend_loss, bends))).mean()


def geometry_of(shape: str, points: Tensor) -> Tensor:
    """Centre x and y and radius in pixels, and angle in radians, of the shape of a contour."""
    if shape in POLYGONS:
        return fit_shape(shape, points)
    radius = ROUND_RADIUS * distances_from_centre(points).mean()
    return torch.stack([*points.mean(0), radius, torch.zeros_like(radius)])


def at_geometry(scene: Scene, geometry: Tensor, height: int, width: int) -> Scene:
    """The scene with its object there.

    Raises:
        ValueError: no object is so large, small or turned.
    """
    x, y, radius, angle = geometry.tolist()
    radius /= min(height, width)
    if not LEAST_RADIUS < radius < MOST_RADIUS or abs(angle) > MOST_ANGLE:
        raise ValueError("The image does not show the object.")
    return replace(scene, things=(Thing(scene.kinds[0], x / width, y / height, radius, angle),))


def bends_of(shape: str, points: Tensor, geometry: Tensor) -> list[Tensor]:
    """How far a contour's points are from what they should be on, in mean distances from their centre."""
    distances = distances_from_centre(points)
    mean = distances.mean()
    if shape not in POLYGONS:
        return [(distances - mean) / mean]
    from_shape = distances_from_shape(shape, points, geometry) / mean
    from_polygon = distances_from_polygon(points) / mean
    return [from_shape, from_polygon] if from_polygon.abs().max() < FAR else [from_shape]


def bend_loss(bend: Tensor) -> Tensor:
    largest = bend.pow(POWER).mean().add(1e-20).pow(1 / POWER)
    return bend.square().mean().add(1e-8).sqrt() + POWER_WEIGHT * largest


def distances_from_shape(shape: str, points: Tensor, geometry: Tensor) -> Tensor:
    """The signed distances, in pixels, of a contour's points from the edges of a square or diamond.

    Points near a corner are left out.
    """
    corners = torch.tensor(CORNERS[shape])
    x, y = as_coordinates(points.detach(), geometry)
    from_corners = torch.cdist(torch.stack([x, y], dim=1), corners).amin(1) * geometry[2]
    return signed_distances(shape, points, geometry)[from_corners > CORNER]


def fit_shape(shape: str, points: Tensor) -> Tensor:
    """The geometry of least squares: centre x and y, radius, all in pixels, and angle in radians.

    Gauss-Newton steps with numerical derivatives.
    """
    points = points.double()
    centre = points.mean(0)
    radius = RADIUS * distances_from_centre(points).mean()
    geometry = torch.stack([*centre, radius, torch.zeros_like(radius)])
    differences, most = torch.tensor(DIFFERENCES).double(), torch.tensor(MOST_STEPS).double()
    for _ in range(FIT_STEPS):
        errors = signed_distances(shape, points, geometry)
        moved = [signed_distances(shape, points, geometry + change) for change in differences.diag()]
        derivatives = (torch.stack(moved, dim=1) - errors[:, None]) / differences
        step = torch.linalg.lstsq(derivatives, -errors[:, None]).solution[:, 0]
        geometry = geometry + step.clamp(-most, most)
    return geometry.float()


def signed_distances(shape: str, points: Tensor, geometry: Tensor) -> Tensor:
    return DISTANCES[shape](*as_coordinates(points, geometry)) * geometry[2]


def as_coordinates(points: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
    """Points (x, y) in pixels, as coordinates of a shape in render.py."""
    x, y = (points - geometry[:2]).unbind(1)
    return in_radii(x, y, geometry[2], geometry[3])
