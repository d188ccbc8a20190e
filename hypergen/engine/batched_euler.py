"""Stepping: every image of a pass takes its sampler's step, alone or together with its like."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from hypergen.denoising.denoising_state import DenoisingState

logger = logging.getLogger(__name__)

# From predictions, latents in float32 and the sigmas of all images before and after the step to new latents.
_Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def advance_all(
    pairs: Sequence[tuple[DenoisingState, Tensor]], batched: bool
) -> Iterator[tuple[DenoisingState, Exception | None]]:
    """Advance each state along its prediction; yields it with what went wrong, if anything did.

    Args:
        pairs: predictions of shape (1, C, h, w) of one model, guidance already applied.
        batched: images with Euler's sampler take one set of operations instead of one each, which saves a
            GPU some ten launches for each image. The bits do not depend on how many there are; on a CPU they
            are those of diffusers, and rounded for a GPU as its kernels are known to round.
    """
    together: dict[DenoisingState, Tensor] = {}
    if batched:
        try:
            together = _step_together(pairs)
        except Exception as error:  # no image has moved yet
            logger.warning("A shared Euler step failed (%s); each image takes its own.", error)
    for state, noise_pred in pairs:
        try:
            if state in together:
                state.apply_step(together[state])
                state.scheduler._step_index = state.step_index
            else:
                state.advance(noise_pred)
        except Exception as error:  # the edge where one image's trouble must not become everyone's
            yield state, error
        else:
            yield state, None


def _euler_of(state: DenoisingState) -> _Step | None:
    """Euler's step for what the model predicts, without noise and with nothing put back after it."""
    scheduler = state.scheduler
    if state.after_step is not None:
        return None
    if type(scheduler) is EulerDiscreteScheduler:  # only `s_churn` would add noise
        return {"epsilon": _epsilon_step, "v_prediction": _velocity_step}.get(
            scheduler.config["prediction_type"]
        )
    if type(scheduler) is FlowMatchEulerDiscreteScheduler and not scheduler.config["stochastic_sampling"]:
        return _flow_step
    return None


def _step_together(pairs: Sequence[tuple[DenoisingState, Tensor]]) -> dict[DenoisingState, Tensor]:
    """The latents after the step of each image with Euler's sampler; changes none of them."""
    steps = [_euler_of(state) for state, _ in pairs]
    step = next(filter(None, steps), None)
    if step is None:
        return {}
    alike = [pair for pair, its_step in zip(pairs, steps, strict=True) if its_step is not None]
    states = [state for state, _ in alike]
    model_output = torch.cat([noise_pred for _, noise_pred in alike])
    sample = torch.cat([state.latents for state in states]).to(torch.float32)

    def sigmas(offset: int) -> Tensor:
        chosen = [t.scheduler.sigmas[t.step_index + offset] for t in states]
        return torch.stack(chosen).to(sample).reshape(-1, 1, 1, 1)

    latents = step(model_output, sample, sigmas(0), sigmas(1)).to(model_output.dtype)
    return dict(zip(states, latents.split(1), strict=True))


def _epsilon_step(model_output: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Algorithm 2 of Karras et al. 2022 (https://arxiv.org/abs/2206.00364) without churn."""
    # diffusers keeps these sigmas on the CPU, where torch rounds a number on the left to the tensor's
    # precision; to a GPU's kernels it goes as it is.
    factor = sigma.to(model_output.dtype) if sample.device.type == "cpu" else sigma
    return _towards(sample - _product(factor, model_output), sample, sigma, next_sigma)


def _velocity_step(model_output: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """The same, for models that predict velocity."""
    scaled = _product(-sigma / (sigma**2 + 1) ** 0.5, model_output)
    return _towards(scaled + sample / (sigma**2 + 1), sample, sigma, next_sigma)


def _towards(pred_original_sample: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    derivative = (sample - pred_original_sample) / sigma
    return sample + derivative * (next_sigma - sigma)


def _flow_step(model_output: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """A straight line along the flow; here diffusers' sigmas are on the device, where the left is rounded."""
    return sample + _product((next_sigma - sigma).to(model_output.dtype), model_output)


def _product(factor: Tensor, model_output: Tensor) -> Tensor:
    """In float32, then rounded to the prediction's precision, as is a product with one number."""
    return (factor.float() * model_output.float()).to(model_output.dtype)
