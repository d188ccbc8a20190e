"""The loss of contours: small for rendered shapes, larger for bent ones, with gradients to straight ones."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from scripts.train_embedded_model.bends import fit_shape, shape_losses
from scripts.train_embedded_model.contours import GATES, POLYGONS, colour_shares, contour
from scripts.train_embedded_model.render import render
from scripts.train_embedded_model.scenes import Kind, Scene, Thing


def _scene(shape: str, thing: tuple[float, float, float, float] = (0.5, 0.5, 0.28, 0.0)) -> Scene:
    kind = Kind(shape, "red")
    return Scene("blue", (kind,), (Thing(kind, *thing),))


def _rendered(*scene: Any) -> Tensor:
    return render([_scene(*scene)], 256, 256)[0]


def _bend(shape: str, image: Tensor) -> Tensor:
    return shape_losses(_scene(shape), image)[1]


@pytest.mark.parametrize("shape", GATES)
def test_the_loss_leads_to_straight_contours(shape: str) -> None:
    straight = _rendered(shape)
    pixels = torch.arange(256)
    wave = (3 * (pixels / 12).sin()).round().long()
    bent = straight.gather(2, (pixels + wave[:, None]).clamp(0, 255).expand_as(straight))
    image = bent.clone().requires_grad_()
    loss = _bend(shape, image)
    assert loss > 3 * _bend(shape, straight)
    (gradient,) = torch.autograd.grad(loss, image)
    assert _bend(shape, bent - 0.2 * gradient / gradient.abs().max()) < loss


@pytest.mark.parametrize("shape", POLYGONS)
def test_a_shape_is_fitted_where_it_was_rendered(shape: str) -> None:
    points = contour(colour_shares(_rendered(shape, (0.4, 0.6, 0.2, 0.08))))
    centre_x, centre_y, radius, angle = fit_shape(shape, points).tolist()
    assert (centre_x, centre_y) == pytest.approx((0.4 * 256, 0.6 * 256), abs=0.1)
    assert radius == pytest.approx(0.2 * 256, abs=0.2)
    assert angle == pytest.approx(0.08, abs=0.005)


@pytest.mark.parametrize("shape", POLYGONS)
def test_a_polygon_of_another_shape_is_bent(shape: str) -> None:
    """A parallelogram: its edges are straight, so the gates alone would not see it."""
    straight = _rendered(shape)
    sheared = straight.gather(2, _columns_sheared_by(0.2).expand_as(straight))
    assert _bend(shape, sheared) > 3 * _bend(shape, straight)


def _columns_sheared_by(angle: float) -> Tensor:
    pixels = torch.arange(256)
    shift = ((pixels - 128) * math.tan(angle)).round().long()
    return (pixels + shift[:, None]).clamp(0, 255)


@pytest.mark.parametrize("shape", GATES)
def test_an_image_without_an_object_has_no_loss(shape: str) -> None:
    with pytest.raises(ValueError, match="does not show an object"):
        shape_losses(_scene(shape), torch.zeros(3, 256, 256))


@pytest.mark.parametrize("shape", GATES)
def test_the_image_may_have_the_object_anywhere_but_in_its_colours(shape: str) -> None:
    image = _rendered(shape, (0.42, 0.57, 0.25, 0.05 if shape in POLYGONS else 0.0))
    assert shape_losses(_scene(shape), image)[0] < 0.002
    faded = image.clone().requires_grad_()
    loss, _ = shape_losses(_scene(shape), 0.9 * faded)
    assert loss > 0.02
    assert torch.autograd.grad(loss, faded)[0].abs().max() > 0
