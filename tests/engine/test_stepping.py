"""Euler's step of many images at once: the bits of diffusers' own step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pytest
import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from hypergen.engine.stepping import advance_all
from hypergen.samplers import SchedulerFactory
from hypergen.trajectory import Conditioning, Trajectory
from tests.engine.inline import make_request

Prediction = Literal["epsilon", "v_prediction"]


def _trajectories(
    samplers: Sequence[str | None], prediction_type: Prediction, dtype: torch.dtype
) -> list[Trajectory]:
    published: Any = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )
    factory = SchedulerFactory(published, torch.device("cpu"))
    made: list[Trajectory] = []
    for seed, sampler in enumerate(samplers):
        generator = torch.Generator().manual_seed(seed)
        scheduler = factory.make(sampler, 4 + seed)
        made.append(
            Trajectory(
                request=make_request(seed=seed),
                index=0,
                latents=torch.randn((1, 4, 6, 10), generator=generator).to(dtype)
                * scheduler.init_noise_sigma,
                positive=Conditioning(torch.zeros(1, 77, 8)),
                negative=None,
                guidance_scale=1.0,
                prompt_tokens=0,
                generator=generator,
                scheduler=scheduler,
                draws_noise=sampler not in ("dpmpp_2m",),
            )
        )
    return made


def _draw(trajectories: list[Trajectory], vectorised: bool) -> list[Tensor]:
    while active := [trajectory for trajectory in trajectories if trajectory.remaining_steps]:
        pairs = [(trajectory, torch.tanh(trajectory.model_input())) for trajectory in active]
        assert [error for _, error in advance_all(pairs, vectorised)] == [None] * len(active)
    return [trajectory.latents for trajectory in trajectories]


_SAMPLERS = ["euler", None, "euler_karras", "euler_a", "dpmpp_2m", "euler"]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_in_float32_steps_taken_together_have_the_bits_of_diffusers(prediction_type: Prediction) -> None:
    stock = _draw(_trajectories(_SAMPLERS, prediction_type, torch.float32), vectorised=False)
    together = _draw(_trajectories(_SAMPLERS, prediction_type, torch.float32), vectorised=True)
    assert [torch.equal(one, other) for one, other in zip(stock, together, strict=True)] == [True] * 6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_in_half_precision_neighbours_do_not_change_the_bits(
    prediction_type: Prediction, dtype: torch.dtype
) -> None:
    together = _draw(_trajectories(_SAMPLERS, prediction_type, dtype), vectorised=True)
    for number, latents in enumerate(together):
        alone = _draw(_trajectories(_SAMPLERS, prediction_type, dtype)[number : number + 1], vectorised=True)
        assert torch.equal(alone[0], latents)
    stock = _draw(_trajectories(_SAMPLERS, prediction_type, dtype), vectorised=False)
    for one, other in zip(stock, together, strict=True):
        assert (one.float() - other.float()).norm() <= 0.02 * one.float().norm()


def test_an_image_that_fails_leaves_the_others_alone() -> None:
    trajectories = _trajectories(["euler", "euler", "dpmpp_2m"], "epsilon", torch.float32)
    pairs = [(trajectory, torch.tanh(trajectory.model_input())) for trajectory in trajectories]
    pairs[2] = (trajectories[2], torch.zeros(1, 3, 6, 10))
    results = dict(advance_all(pairs, vectorised=True))
    assert results[trajectories[0]] is None
    assert results[trajectories[1]] is None
    assert isinstance(results[trajectories[2]], RuntimeError)
