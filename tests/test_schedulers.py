"""Samplers: numbers of steps, prediction types, and independent schedulers per image."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from hypergen.api.sampler_aliases import public_name
from hypergen.denoising.schedulers import (
    FLOW_SAMPLERS,
    SAMPLERS,
    FlowSchedulerFactory,
    SchedulerFactory,
    takes_generator,
)

_STABLE_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
_PUBLISHED = {
    "epsilon": DDIMScheduler(prediction_type="epsilon", **_STABLE_DIFFUSION),
    "epsilon, trailing": DDIMScheduler(
        prediction_type="epsilon", timestep_spacing="trailing", **_STABLE_DIFFUSION
    ),
    "v_prediction": DDIMScheduler(prediction_type="v_prediction", **_STABLE_DIFFUSION),
    # Zero terminal SNR excludes noise prediction: it would divide by zero.
    "v_prediction, zero terminal snr": DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        **_STABLE_DIFFUSION,
    ),
}
_NAMES: list[str | None] = [None, *SAMPLERS]
# Samplers whose classes ignore zero terminal SNR.
_IGNORING = ("dpmpp_sde", "dpmpp_singlestep", "heun", "kdpm2", "lms", "pndm")


class Image:
    """A minimal denoising state: latents, a scheduler, and `tanh` as the denoiser."""

    def __init__(self, factory: SchedulerFactory, sampler: str | None, steps: int, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.scheduler = factory.make(sampler, steps)
        self.latents = torch.randn(1, 4, 4, 4, generator=self.generator) * self.scheduler.init_noise_sigma
        self.timesteps = list(self.scheduler.timesteps)
        self.noise = {"generator": self.generator} if takes_generator(self.scheduler) else {}

    def step(self) -> None:
        timestep = self.timesteps.pop(0)
        prediction = torch.tanh(self.scheduler.scale_model_input(self.latents, timestep))
        self.latents = self.scheduler.step(
            prediction, timestep, self.latents, return_dict=False, **self.noise
        )[0]

    def run(self) -> torch.Tensor:
        while self.timesteps:
            self.step()
        return self.latents


@pytest.mark.parametrize("published", _PUBLISHED)
@pytest.mark.parametrize("sampler", _NAMES)
def test_every_sampler_supports_few_and_many_steps(sampler: str | None, published: str) -> None:
    factory = SchedulerFactory(_PUBLISHED[published])
    if sampler in _IGNORING and "zero terminal" in published:
        assert sampler not in factory.samplers
        return
    min_steps = SAMPLERS[sampler].min_steps if sampler else 1
    for steps in {min_steps, 2, 3, 4, 7, 20, 150}:
        latents = Image(factory, sampler, steps, seed=steps).run()
        assert latents.dtype == torch.float32
        assert torch.isfinite(latents).all(), f"{steps} steps"
        assert latents.abs().max() < 1e3


@pytest.mark.parametrize("sampler", _NAMES)
def test_interleaved_images_share_no_scheduler_state(sampler: str | None) -> None:
    factory = SchedulerFactory(_PUBLISHED["v_prediction"])
    alone = [Image(factory, sampler, steps, seed).run() for seed, steps in enumerate((6, 6, 9))]
    images = [Image(factory, sampler, steps, seed) for seed, steps in enumerate((6, 6, 9))]
    while any(image.timesteps for image in images):
        for image in images:
            if image.timesteps:
                image.step()
    assert all(torch.equal(image.latents, latents) for image, latents in zip(images, alone, strict=True))


def test_a_used_scheduler_leaves_its_prototype_unchanged() -> None:
    factory = SchedulerFactory(_PUBLISHED["epsilon"])
    for name in SAMPLERS:
        first = Image(factory, name, 5, seed=3).run()
        assert torch.equal(first, Image(factory, name, 5, seed=3).run()), name


def test_old_prototypes_are_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SchedulerFactory, "_KEPT_PROTOTYPES", 3)
    factory = SchedulerFactory(_PUBLISHED["epsilon"])
    for steps in range(1, 10):
        assert len(factory.make("euler", steps).timesteps) == steps
    assert factory._prototype.cache_info().currsize == 3


def test_lcm_supports_more_steps_than_it_was_distilled_on_and_keeps_its_timesteps_for_few() -> None:
    factory = SchedulerFactory(_PUBLISHED["epsilon"])
    assert len(factory.make("lcm", 150).timesteps) == 150
    stock: Any = LCMScheduler.from_config(_PUBLISHED["epsilon"].config)
    stock.set_timesteps(4)
    assert torch.equal(factory.make("lcm", 4).timesteps, stock.timesteps)


def test_a_model_published_with_pndm_supports_one_step() -> None:
    published = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    factory = SchedulerFactory(published)
    for steps in (1, 2, 5):
        assert torch.isfinite(Image(factory, None, steps, seed=0).run()).all()


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("image_tokens", [16, 256, 4096])
def test_flow_timesteps_shift_with_the_image_size(sampler: str, image_tokens: int) -> None:
    published: Any = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    factory = FlowSchedulerFactory(published, sigmas_end_at_last_step=False)
    stock: Any = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    stock.set_timesteps(6, mu=calculate_shift(image_tokens))
    timesteps = factory.make(sampler, 6, image_tokens).timesteps.unique()
    torch.testing.assert_close(timesteps, stock.timesteps.unique())
    if sampler == "heun":
        assert len(factory.make(sampler, 6, image_tokens).timesteps) == 11


@pytest.mark.parametrize("sampler", FLOW_SAMPLERS)
@pytest.mark.parametrize("shifts", [True, False])
def test_every_flow_sampler_supports_few_and_many_steps(sampler: str, shifts: bool) -> None:
    published = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=shifts)
    for sigmas_end_at_last_step in (True, False):
        factory = FlowSchedulerFactory(published, sigmas_end_at_last_step=sigmas_end_at_last_step)
        for steps in (1, 2, 3, 20, 150):
            scheduler = factory.make(sampler, steps, 1024)
            latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(steps))
            for timestep in scheduler.timesteps:
                latents = scheduler.step(torch.tanh(latents), timestep, latents, return_dict=False)[0]
            assert torch.isfinite(latents).all()
            assert latents.abs().max() < 10
            assert scheduler.sigmas[-1] == 0


def test_sampler_names_of_other_programs_are_aliases() -> None:
    names = {
        "DPM++ 2M Karras": "dpmpp_2m_karras",
        "DPM++ SDE": "dpmpp_sde",
        "Euler a": "euler_a",
        "k_euler_ancestral": "euler_a",
        "DPM2": "kdpm2",
        "UniPC": "unipc",
        "PLMS": "pndm",
        "TCD": "tcd",
    }
    assert {name: public_name(name) for name in names} == names
    assert set(names.values()) <= SAMPLERS.keys()
    assert [public_name(name) for name in [*SAMPLERS, *FLOW_SAMPLERS]] == [*SAMPLERS, *FLOW_SAMPLERS]
    assert public_name("Eular?") not in SAMPLERS
