"""How far a decoded image of one object is from a rendered one, with gradients: a loss of `straighten`."""

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
from .render import DISTANCES, render
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


def image_loss(scene: Scene, image: Tensor) -> Tensor:
    """The mean difference from the rendered image of the scene, with the object where it is in the image.

    Args:
        scene: of one object.
        image: float, shape (3, H, W), in -1..1.

    Raises:
        ValueError: the image does not show the object.
    """
    (kind,) = scene.kinds
    height, width = image.shape[1:]
    with torch.no_grad():
        x, y, radius, angle = geometry_of(kind.shape, contour(colour_shares(image)))
        radius /= min(height, width)
        if not LEAST_RADIUS < radius < MOST_RADIUS or abs(angle) > MOST_ANGLE:
            raise ValueError("The image does not show the object.")
        thing = Thing(kind, x / width, y / height, radius, angle)
        rendered = render([replace(scene, things=(thing,))], height, width)[0]
    return (image - rendered).abs().mean()


def geometry_of(shape: str, points: Tensor) -> list[float]:
    """Centre x and y and radius in pixels, and angle in radians, of the shape of a contour."""
    if not points.isfinite().all():
        raise ValueError("The image does not show an object.")
    if shape in POLYGONS:
        return fit_shape(shape, points).tolist()
    return [*points.mean(0).tolist(), ROUND_RADIUS * float(distances_from_centre(points).mean()), 0.0]


def bend_loss(shape: str, image: Tensor) -> Tensor:
    """How bent the contours of an image of one object are, in mean distances from their centres.

    Args:
        image: float, shape (3, H, W), in -1..1.

    Raises:
        ValueError: the image does not show an object.
    """
    losses = [
        bend.square().mean().add(1e-8).sqrt()
        + POWER_WEIGHT * bend.pow(POWER).mean().add(1e-20).pow(1 / POWER)
        for bend in bends(shape, image)
    ]
    return torch.stack(losses).mean()


def bends(shape: str, image: Tensor) -> list[Tensor]:
    """How far a contour's points are from what they should be on, one tensor for each comparison.

    The unit is their mean distance from the centre. Both contours of a ring are compared with circles, and
    the contour of a square or diamond with that shape, and with the polygon of the gates if it is near one.
    Gradients pass to the image.
    """
    shares = colour_shares(image)
    found: list[Tensor] = []
    for inner in (False, True) if shape == "ring" else (False,):
        points = contour(shares, inner)
        if not points.isfinite().all():
            raise ValueError("The image does not show an object.")
        distances = distances_from_centre(points)
        mean = distances.mean()
        if shape not in POLYGONS:
            found.append((distances - mean) / mean)
            continue
        found.append(distances_from_shape(shape, points) / mean)
        from_polygon = distances_from_polygon(points) / mean
        if from_polygon.abs().max() < FAR:
            found.append(from_polygon)
    return found


def distances_from_shape(shape: str, points: Tensor) -> Tensor:
    """The signed distances, in pixels, of a contour's points from the edges of a square or diamond fitted to
    them. Points near a corner are left out. Gradients do not pass through the fit.
    """
    geometry = fit_shape(shape, points.detach())
    corners = torch.tensor(CORNERS[shape])
    x, y = in_radii(points.detach(), geometry)
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
    return DISTANCES[shape](*in_radii(points, geometry)) * geometry[2]


def in_radii(points: Tensor, geometry: Tensor) -> tuple[Tensor, Tensor]:
    """Points (x, y) in pixels, as coordinates of a shape in render.py."""
    centre_x, centre_y, radius, angle = geometry
    x, y = (points - torch.stack([centre_x, centre_y])).unbind(1)
    turned_x, turned_y = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    return turned_x / radius, turned_y / radius
