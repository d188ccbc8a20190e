"""Batched Euler steps are bit-exact with diffusers' own steps."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.schedulers import FlowSchedulerFactory, SchedulerFactory, takes_generator
from hypergen.engine.batched_euler import advance_all
from tests.support.sync_engine import make_request

Prediction = Literal["epsilon", "v_prediction", "flow"]
ON_CUDA = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]
_SAMPLERS = ["euler", None, "euler_karras", "euler_a", "dpmpp_2m", "euler"]
_FLOW_SAMPLERS = ["euler", None, "heun", "euler"]


def _factory(prediction: Prediction, device: torch.device) -> SchedulerFactory:
    if prediction == "flow":  # with FLUX's dynamic shift
        published: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
        return FlowSchedulerFactory(published, sigmas_end_at_last_step=True)
    published = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction
    )
    return SchedulerFactory(published)


def _states(prediction: Prediction, dtype: torch.dtype, device: str = "cpu") -> list[DenoisingState]:
    factory = _factory(prediction, torch.device(device))
    states: list[DenoisingState] = []
    for seed, sampler in enumerate(_FLOW_SAMPLERS if prediction == "flow" else _SAMPLERS):
        generator = torch.Generator().manual_seed(seed)
        scheduler = factory.make(sampler, 4 + seed, image_tokens=256)
        noise = torch.randn((1, 4, 6, 10), generator=generator).to(device, dtype)
        states.append(
            DenoisingState(
                request=make_request(seed=seed),
                index=0,
                latents=noise * getattr(scheduler, "init_noise_sigma", 1.0),
                positive=ModelInputs(torch.zeros(1, 77, 8)),
                negative=None,
                guidance_scale=1.0,
                prompt_tokens=0,
                generator=generator,
                scheduler=scheduler,
                is_stochastic=takes_generator(scheduler),
            )
        )
    return states


def _generate(states: list[DenoisingState], batched: bool) -> list[Tensor]:
    while active := [state for state in states if state.remaining_steps]:
        pairs = [(state, torch.tanh(state.model_input())) for state in active]
        assert [error for _, error in advance_all(pairs, batched)] == [None] * len(active)
    return [state.latents for state in states]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=ON_CUDA)])
def test_batched_steps_are_bit_exact_with_diffusers(
    device: str, prediction: Prediction, dtype: torch.dtype
) -> None:
    reference = _generate(_states(prediction, dtype, device), batched=False)
    batched = _generate(_states(prediction, dtype, device), batched=True)
    assert {latents.dtype for latents in batched} == {dtype}
    same = [torch.equal(one, other) for one, other in zip(reference, batched, strict=True)]
    assert same == [True] * len(reference)


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_images_with_an_euler_sampler_share_one_set_of_operations(prediction: Prediction) -> None:
    """Otherwise the tests above would not test the batched step."""
    states = [state for state in _states(prediction, torch.float32) if state.request.seed < 2]
    pairs = [(state, torch.tanh(state.model_input())) for state in states]
    with profile(activities=[ProfilerActivity.CPU]) as operations:
        assert [error for _, error in advance_all(pairs, batched=True)] == [None, None]
    counts = {event.key: event.count for event in operations.key_averages()}
    assert counts["aten::mul"] == (1 if prediction == "flow" else 2)


def test_a_failing_image_does_not_affect_the_others() -> None:
    states = [s for s in _states("epsilon", torch.float32) if s.request.seed in (0, 1, 4)]
    pairs = [(state, torch.tanh(state.model_input())) for state in states]
    pairs[2] = (states[2], torch.zeros(1, 3, 6, 10))
    results = dict(advance_all(pairs, batched=True))
    assert results[states[0]] is None
    assert results[states[1]] is None
    assert isinstance(results[states[2]], RuntimeError)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("broken", ["prediction", "sigmas"])
def test_after_a_failing_batched_step_each_image_steps_alone_and_once(
    prediction: Prediction, broken: str
) -> None:
    def make() -> list[DenoisingState]:
        return [
            state
            for state in _states(prediction, torch.float32)
            if type(state.scheduler).__name__.endswith("EulerDiscreteScheduler")
        ]

    reference, images = make(), make()
    _generate(reference[:-1], batched=False)
    bad = images[-1]
    if broken == "sigmas":
        bad.scheduler.sigmas = None
    while active := [image for image in images[:-1] if image.remaining_steps]:
        pairs = [(image, torch.tanh(image.model_input())) for image in active]
        pairs.append((bad, torch.zeros(1, 4 if broken == "sigmas" else 3, 6, 10)))
        before = [image.step_index for image, _ in pairs]
        *fine, failed = advance_all(pairs, batched=True)
        assert [error for _, error in fine] == [None] * len(active)
        assert failed[0] is bad
        assert isinstance(failed[1], Exception)
        steps_taken = [image.step_index - step for (image, _), step in zip(pairs, before, strict=True)]
        assert steps_taken == [1] * len(active) + [0]
    assert all(torch.equal(a.latents, b.latents) for a, b in zip(reference[:-1], images[:-1], strict=True))
