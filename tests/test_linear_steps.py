"""Linear steps give what diffusers' schedulers give, for every sampler, kind of prediction and beginning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from hypergen.denoising.linear_steps import Clip, apply_step, linear_steps
from hypergen.denoising.schedulers import (
    FlowSchedulerFactory,
    SchedulerFactory,
    takes_generator,
)
from tests.support.samplers import ALL_FLOW_NAMES, ALL_NAMES, SOME_NAMES, STABLE_DIFFUSION

_SHAPE = (1, 4, 8, 8)


def _published(**changes: Any) -> Any:
    """As Stable Diffusion's."""
    return DDIMScheduler(**{**STABLE_DIFFUSION, **changes})


def _errors(scheduler: Any, begin: int = 0) -> list[float]:
    """The relative distance between diffusers' latents and those of the linear steps, step by step."""
    steps = linear_steps(scheduler, begin)
    assert steps is not None
    ours_generator, theirs_generator = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    noise = {"generator": theirs_generator} if takes_generator(scheduler) else {}
    source = torch.Generator().manual_seed(4)
    ours = theirs = torch.randn(_SHAPE, generator=source) * getattr(scheduler, "init_noise_sigma", 1.0)
    history: list[Tensor] = []
    errors: list[float] = []
    for step, timestep in zip(steps, scheduler.timesteps[begin:], strict=True):
        if hasattr(scheduler, "scale_model_input"):
            scaled = scheduler.scale_model_input(theirs, timestep)
            errors.append(float((ours * step.input_scale - scaled).abs().max() / scaled.abs().max()))
        prediction = torch.randn(_SHAPE, generator=source)
        theirs = scheduler.step(prediction, timestep, theirs, return_dict=False, **noise)[0]
        sample = torch.randn(_SHAPE, generator=ours_generator) if step.samples_noise else torch.zeros(_SHAPE)
        ours, history = apply_step(step, [ours, prediction, sample, *history])
        errors.append(float((ours - theirs).abs().max() / theirs.abs().max()))
    assert torch.equal(ours_generator.get_state(), theirs_generator.get_state())
    return errors


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("sampler", ALL_NAMES)
@pytest.mark.parametrize("steps", [2, 8, 30])
def test_every_sampler_is_linear(sampler: str, prediction: str, steps: int) -> None:
    factory = SchedulerFactory(_published(prediction_type=prediction))
    assert max(_errors(factory.make(sampler, steps))) < 1e-4


@pytest.mark.parametrize("sampler", SOME_NAMES)
def test_steps_that_begin_later_have_their_own_coefficients(sampler: str) -> None:
    scheduler = SchedulerFactory(_published()).make(sampler, 20)
    begin = 8 * scheduler.order
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    assert max(_errors(scheduler, begin)) < 1e-4


@pytest.mark.parametrize("sampler", ALL_FLOW_NAMES)
def test_flow_matching_is_linear(sampler: str) -> None:
    factory = FlowSchedulerFactory(FlowMatchEulerDiscreteScheduler(shift=3.0), sigmas_end_at_last_step=False)
    assert max(_errors(factory.make(sampler, 12))) < 1e-4


# The schedulers that diffusers lets clip the predicted clean latents.
_CLIPPING: dict[str, set[type]] = {
    "clip_sample": {DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler, LCMScheduler},
    "thresholding": {
        DDIMScheduler,
        DDPMScheduler,
        DEISMultistepScheduler,
        DPMSolverMultistepScheduler,
        DPMSolverSinglestepScheduler,
        LCMScheduler,
        UniPCMultistepScheduler,
    },
}


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", _CLIPPING)
@pytest.mark.parametrize("sampler", SOME_NAMES)
def test_clipped_latents_are_one_term_more(sampler: str, kind: str, prediction: str) -> None:
    limits = {"clip_sample_range": 0.7, "sample_max_value": 2.0}
    published = _published(prediction_type=prediction, **limits, **{kind: True})
    scheduler = SchedulerFactory(published).make(sampler, 12)
    clips = [step.clipped is not None for step in linear_steps(scheduler) or ()]
    assert max(_errors(scheduler)) < 1e-4
    assert set(clips) == {type(scheduler) in _CLIPPING[kind]}


@pytest.mark.parametrize("ratio", [0.5, 0.995, 1.0])
def test_dynamic_thresholding_clips_each_image_at_its_own_quantile(ratio: float) -> None:
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=ratio, sample_max_value=2.5)
    latents = torch.randn((5, *_SHAPE[1:])) * torch.tensor([0.1, 1, 2, 3, 1]).reshape(-1, 1, 1, 1)
    clipped = Clip(2.5, ratio).apply(latents)
    torch.testing.assert_close(clipped, scheduler._threshold_sample(latents), rtol=1e-6, atol=0)


def test_few_terms_are_enough() -> None:
    """Each term is one operation over all images of a batch."""
    factory = SchedulerFactory(_published())
    terms = {
        sampler: max(len(step.inputs) for step in linear_steps(factory.make(sampler, 20)) or ())
        for sampler in SOME_NAMES
    }
    assert terms["euler"] == terms["ddim"] == 2
    assert terms["euler_a"] == terms["dpmpp_2m_karras"] == terms["lcm"] == 3
    assert max(terms.values()) == 5
