"""Stepping: every image of a pass takes its sampler's step, alone or together with its like."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from diffusers import EulerDiscreteScheduler
from torch import Tensor

from hypergen.trajectory import Trajectory


def advance_all(
    pairs: Sequence[tuple[Trajectory, Tensor]], vectorised: bool
) -> Iterator[tuple[Trajectory, Exception | None]]:
    """Advance each trajectory along its prediction; yields it with what went wrong, if anything did.

    Args:
        pairs: predictions of shape (1, C, h, w), guidance already applied.
        vectorised: images with Euler's sampler take one set of operations instead of one each, which saves a
            GPU some ten launches for each image. The bits do not depend on how many there are; in float32
            they are those of diffusers, in half precision its last bit may differ.
    """
    alike = [(trajectory, noise_pred) for trajectory, noise_pred in pairs if _is_plain_euler(trajectory)]
    together = alike if vectorised else []
    if together:
        _euler_steps([trajectory for trajectory, _ in together], [noise_pred for _, noise_pred in together])
    advanced = {trajectory for trajectory, _ in together}
    for trajectory, noise_pred in pairs:
        if trajectory in advanced:
            yield trajectory, None
            continue
        try:
            trajectory.advance(noise_pred)
        except Exception as error:  # the edge where one image's trouble must not become everyone's
            yield trajectory, error
        else:
            yield trajectory, None


def _is_plain_euler(trajectory: Trajectory) -> bool:
    """Without noise of its own, which only `s_churn` would add, for two predictions, and nothing put back."""
    scheduler = trajectory.scheduler
    if trajectory.after_step is not None:
        return False
    if type(scheduler) is not EulerDiscreteScheduler:
        return False
    return scheduler.config["prediction_type"] in ("epsilon", "v_prediction")


def _euler_steps(trajectories: Sequence[Trajectory], predictions: Sequence[Tensor]) -> None:
    """`EulerDiscreteScheduler.step` of all of them at once: Algorithm 2 of Karras et al. 2022
    (https://arxiv.org/abs/2206.00364) without churn, rounded where diffusers rounds.
    """
    model_output = torch.cat(list(predictions))
    sample = torch.cat([trajectory.latents for trajectory in trajectories]).to(torch.float32)
    schedulers = [trajectory.scheduler for trajectory in trajectories]
    index = [trajectory.step_index for trajectory in trajectories]

    def column(values: list[Tensor]) -> Tensor:
        return torch.stack(values).to(sample).reshape(-1, 1, 1, 1)

    sigma = column([scheduler.sigmas[i] for scheduler, i in zip(schedulers, index, strict=True)])
    next_sigma = column([scheduler.sigmas[i + 1] for scheduler, i in zip(schedulers, index, strict=True)])
    # One prediction type for all: they come from one model.
    if schedulers[0].config["prediction_type"] == "epsilon":
        scaled = (sigma * model_output.float()).to(model_output.dtype)
        pred_original_sample = sample - scaled
    else:
        scaled = (model_output.float() * (-sigma / (sigma**2 + 1) ** 0.5)).to(model_output.dtype)
        pred_original_sample = scaled + sample / (sigma**2 + 1)
    derivative = (sample - pred_original_sample) / sigma
    latents = (sample + derivative * (next_sigma - sigma)).to(model_output.dtype)
    for trajectory, advanced in zip(trajectories, latents.split(1), strict=True):
        trajectory.stepped(advanced)
        trajectory.scheduler._step_index = trajectory.step_index
