"""The scheduler steps of a batch: Euler's for many images at once, all others one by one."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from hypergen.denoising.denoising_state import DenoisingState

logger = logging.getLogger(__name__)

# (model_output, sample in float32, sigmas, next sigmas) -> the next sample; one row per image.
_EulerStep = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def advance_all(
    pairs: Sequence[tuple[DenoisingState, Tensor]], batched: bool
) -> Iterator[tuple[DenoisingState, Exception | None]]:
    """Advance each image by its prediction; yields each with the exception of its step, or None.

    Args:
        pairs: with predictions of shape (1, C, h, w) of one model, guidance already applied.
        batched: compute the steps of all images with an Euler sampler together, which saves about ten kernel
            launches per image on a GPU. The result is bit-exact for any number of images: on a CPU the same
            as diffusers', on a GPU rounded like its kernels.
    """
    batched_latents: dict[DenoisingState, Tensor] = {}
    if batched:
        try:
            batched_latents = _batched_step(pairs)
        except Exception as error:  # Isolate the failure: no state was changed, so each can step alone.
            logger.warning("A batched Euler step failed (%s); stepping each image alone.", error)
    for state, noise_pred in pairs:
        try:
            if state in batched_latents:
                state.apply_step(batched_latents[state])
                state.scheduler._step_index = state.step_index
            else:
                state.advance(noise_pred)
        except Exception as error:  # Isolate the failure: only this image fails.
            yield state, error
        else:
            yield state, None


def _euler_step_of(state: DenoisingState) -> _EulerStep | None:
    """The Euler step for the model's prediction type.

    None if the sampler is not a deterministic Euler sampler or the image has an `after_step`.
    """
    scheduler = state.scheduler
    if state.after_step is not None:
        return None
    if type(scheduler) is EulerDiscreteScheduler:  # deterministic: only `s_churn` would add noise
        return {"epsilon": _epsilon_step, "v_prediction": _velocity_step}.get(
            scheduler.config["prediction_type"]
        )
    if type(scheduler) is FlowMatchEulerDiscreteScheduler and not scheduler.config["stochastic_sampling"]:
        return _flow_step
    return None


def _batched_step(pairs: Sequence[tuple[DenoisingState, Tensor]]) -> dict[DenoisingState, Tensor]:
    """The latents after the step, for the images with an Euler sampler; changes no state."""
    steps = [_euler_step_of(state) for state, _ in pairs]
    step = next(filter(None, steps), None)  # one for all: they share a model
    if step is None:
        return {}
    euler_pairs = [pair for pair, euler_step in zip(pairs, steps, strict=True) if euler_step is not None]
    states = [state for state, _ in euler_pairs]
    model_output = torch.cat([noise_pred for _, noise_pred in euler_pairs])
    sample = torch.cat([state.latents for state in states]).to(torch.float32)

    def sigmas(offset: int) -> Tensor:
        values = [state.scheduler.sigmas[state.step_index + offset] for state in states]
        return torch.stack(values).to(sample).reshape(-1, 1, 1, 1)

    latents = step(model_output, sample, sigmas(0), sigmas(1)).to(model_output.dtype)
    return dict(zip(states, latents.split(1), strict=True))


def _epsilon_step(model_output: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Algorithm 2 of Karras et al. 2022 (https://arxiv.org/abs/2206.00364) without churn."""
    # diffusers keeps these sigmas on the CPU. There torch rounds a scalar factor to the tensor's dtype;
    # for a GPU's kernels it does not.
    factor = sigma.to(model_output.dtype) if sample.device.type == "cpu" else sigma
    return _euler_update(sample - _rounded_product(factor, model_output), sample, sigma, next_sigma)


def _velocity_step(model_output: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """The same for v-prediction."""
    scaled = _rounded_product(-sigma / (sigma**2 + 1) ** 0.5, model_output)
    return _euler_update(scaled + sample / (sigma**2 + 1), sample, sigma, next_sigma)


def _euler_update(pred_original_sample: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    derivative = (sample - pred_original_sample) / sigma
    return sample + derivative * (next_sigma - sigma)


def _flow_step(model_output: Tensor, sample: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Flow matching. Here diffusers' sigmas are on the device, where the factor is always rounded."""
    return sample + _rounded_product((next_sigma - sigma).to(model_output.dtype), model_output)


def _rounded_product(factor: Tensor, model_output: Tensor) -> Tensor:
    """Multiply in float32, then round to the prediction's dtype, as torch does with a scalar factor."""
    return (factor.float() * model_output.float()).to(model_output.dtype)
