"""Samplers: numbers of steps, prediction types, and independent schedulers per image."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, LCMScheduler, PNDMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from hypergen import sampler_names
from hypergen.api.sampler_aliases import ALIASES, SCHEDULE_ALIASES, schedule_name, split_name
from hypergen.denoising.schedulers import (
    EDM_SAMPLERS,
    FLOW_SAMPLERS,
    SAMPLERS,
    SCHEDULES,
    FlowSchedulerFactory,
    SchedulerFactory,
    find_sampler,
    ignored_field,
    takes_generator,
)
from tests.support.samplers import ALL_NAMES, STABLE_DIFFUSION, WITH_SCHEDULES

_PUBLISHED = {
    "epsilon": DDIMScheduler(prediction_type="epsilon", **STABLE_DIFFUSION),
    "epsilon, trailing": DDIMScheduler(
        prediction_type="epsilon", timestep_spacing="trailing", **STABLE_DIFFUSION
    ),
    "v_prediction": DDIMScheduler(prediction_type="v_prediction", **STABLE_DIFFUSION),
    # Zero terminal SNR excludes noise prediction: it would divide by zero.
    "v_prediction, zero terminal snr": DDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        **STABLE_DIFFUSION,
    ),
}
_NAMES: list[str | None] = [None, *ALL_NAMES]
# Samplers whose classes ignore zero terminal SNR.
_IGNORING = ("deis", "dpmpp_sde", "dpmpp_singlestep", "heun", "kdpm2", "kdpm2_a", "lms", "pndm")


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
    if sampler and split_name(sampler)[0] in _IGNORING and "zero terminal" in published:
        assert split_name(sampler)[0] not in factory.samplers
        return
    min_steps = find_sampler(sampler, SAMPLERS).min_steps if sampler else 1
    for steps in {min_steps, 2, 3, 4, 7, 20, 150}:
        latents = Image(factory, sampler, steps, seed=steps).run()
        assert latents.dtype == torch.float32
        assert torch.isfinite(latents).all(), f"{steps} steps"
        assert latents.abs().max() < 1e3


@pytest.mark.parametrize("sampler", [None, *SAMPLERS, "dpmpp_3m_sde_karras", "kdpm2_a_beta"])
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


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_karras", "euler_exponential", "euler_beta"])
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


@pytest.mark.parametrize("published", ["epsilon", "v_prediction, zero terminal snr"])
def test_every_schedule_of_a_sampler_changes_its_steps(published: str) -> None:
    factory = SchedulerFactory(_PUBLISHED[published])
    for name, sampler in factory.samplers.items():
        steps: dict[str, Any] = {}
        for schedule in sampler.schedules:
            scheduler = factory.make(f"{name}_{schedule}", 7)
            steps[schedule] = scheduler.timesteps.tolist()
        distinct = {str(timesteps) for timesteps in steps.values()}
        # diffusers has one setting for these two.
        assert steps.get("simple") == steps.get("sgm_uniform")
        assert len(distinct) == len(steps) - ("simple" in steps), name


def test_a_schedule_replaces_that_of_the_model() -> None:
    published = _PUBLISHED["epsilon"]
    karras: Any = find_sampler("dpmpp_2m_karras", SAMPLERS).scheduler.from_config(
        published.config, use_karras_sigmas=True
    )
    factory = SchedulerFactory(karras)
    assert factory.make(None, 5).config.use_karras_sigmas
    assert factory.make("dpmpp_2m", 5).config.use_karras_sigmas
    plain = SchedulerFactory(published)
    for name in ("dpmpp_2m_exponential", "dpmpp_2m_normal", "euler_beta"):
        assert torch.equal(factory.make(name, 5).timesteps, plain.make(name, 5).timesteps)


@pytest.mark.parametrize("name", ["euler_a_karras", "ddim_exponential", "lcm_simple", "euler_k", "karras"])
def test_a_schedule_that_diffusers_does_not_have_is_not_found(name: str) -> None:
    with pytest.raises(KeyError):
        find_sampler(name, SAMPLERS)


_OF_OTHER_PROGRAMS = {
    # A1111
    "DPM++ 2M": ("dpmpp_2m", None),
    "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
    "DPM++ 2M SDE Karras": ("dpmpp_2m_sde", "karras"),
    "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
    "DPM++ 2M SGM Uniform": ("dpmpp_2m", "sgm_uniform"),
    "DPM++ SDE": ("dpmpp_sde", None),
    "DPM++ SDE Karras": ("dpmpp_sde", "karras"),
    "DPM++ 3M SDE": ("dpmpp_3m_sde", None),
    "DPM++ 3M SDE Karras": ("dpmpp_3m_sde", "karras"),
    "DPM2": ("kdpm2", None),
    "DPM2 Karras": ("kdpm2", "karras"),
    "DPM2 a Karras": ("kdpm2_a", "karras"),
    "Euler": ("euler", None),
    "Euler a": ("euler_a", None),
    "Euler a Karras": ("euler_a", "karras"),  # which diffusers does not have
    "LMS Karras": ("lms", "karras"),
    "Heun Beta": ("heun", "beta"),
    "UniPC": ("unipc", None),
    "PLMS": ("pndm", None),
    "DDIM": ("ddim", None),
    "LCM": ("lcm", None),
    "TCD": ("tcd", None),
    # ComfyUI
    "euler_ancestral": ("euler_a", None),
    "dpm_2": ("kdpm2", None),
    "dpm_2_ancestral": ("kdpm2_a", None),
    "dpmpp_2m_sde_gpu": ("dpmpp_2m_sde", None),
    "dpmpp_3m_sde_gpu": ("dpmpp_3m_sde", None),
    "dpmpp_sde_gpu": ("dpmpp_sde", None),
    "uni_pc": ("unipc", None),
    "deis": ("deis", None),
    # InvokeAI
    "dpmpp_2m_k": ("dpmpp_2m", "karras"),
    "dpmpp_2m_sde_k": ("dpmpp_2m_sde", "karras"),
    "dpmpp_2s_k": ("dpmpp_singlestep", "karras"),
    "dpmpp_3m_k": ("dpmpp_3m", "karras"),
    "dpmpp_sde_k": ("dpmpp_sde", "karras"),
    "deis_k": ("deis", "karras"),
    "euler_k": ("euler", "karras"),
    "kdpm_2": ("kdpm2", None),
    "kdpm_2_a_k": ("kdpm2_a", "karras"),
    "lms_k": ("lms", "karras"),
    "unipc_k": ("unipc", "karras"),
    # k-diffusion
    "k_euler_ancestral": ("euler_a", None),
    "k_dpm_2_a": ("kdpm2_a", None),
    "k_dpmpp_2m": ("dpmpp_2m", None),
}


def test_sampler_names_of_other_programs_are_aliases() -> None:
    assert {name: split_name(name) for name in _OF_OTHER_PROGRAMS} == _OF_OTHER_PROGRAMS
    assert {sampler for sampler, _ in _OF_OTHER_PROGRAMS.values()} <= SAMPLERS.keys()
    assert set(ALIASES.values()) <= SAMPLERS.keys()
    assert split_name("Eular?")[0] not in SAMPLERS


def test_our_names_are_not_aliases_of_others() -> None:
    assert [split_name(name) for name in SAMPLERS] == [(name, None) for name in SAMPLERS]
    assert [split_name(f"{sampler}_{name}") for sampler, name in WITH_SCHEDULES] == WITH_SCHEDULES
    assert [schedule_name(name) for name in SCHEDULES] == [*SCHEDULES]
    assert set(SCHEDULE_ALIASES.values()) == set(SCHEDULES)
    names = {"Karras": "karras", "SGM Uniform": "sgm_uniform", "Uniform": "normal", "Automatic": None}
    assert {name: schedule_name(name) for name in names} == names


# The tables of docs/api.md.


def _code(names: Iterable[str]) -> str:
    return " ".join(f"`{name}`" for name in names)


def sampler_rows() -> list[str]:
    rows = [
        (name, sampler.schedules, [alias for alias, ours in ALIASES.items() if ours == name])
        for name, sampler in SAMPLERS.items()
    ]
    return [f"| `{name}` | {_code(schedules)} | {_code(others)} |" for name, schedules, others in rows]


def flow_rows() -> list[str]:
    return [f"| `{name}` | {_code(sampler.schedules)} |" for name, sampler in FLOW_SAMPLERS.items()]


def schedule_rows() -> list[str]:
    rows: list[str] = []
    for name, changes in SCHEDULES.items():
        others = [alias for alias, ours in SCHEDULE_ALIASES.items() if ours == name != alias and alias != "k"]
        fields = _code(f"{field}={value!r}" for field, value in changes.items())
        rows.append(f"| `{name}` | {fields} | {_code(others)} |")
    return rows


def test_the_tables_of_the_documents_are_those_of_the_code() -> None:
    page = (Path(__file__).parents[1] / "docs" / "api.md").read_text(encoding="utf-8")
    section = page.partition("\n## Samplers\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    assert rows == [*sampler_rows(), *flow_rows(), *schedule_rows()]


def test_the_tables_for_checks_without_torch_are_those_of_the_classes() -> None:
    assert set(sampler_names.SCHEDULE_NAMES) == set(SCHEDULES)
    for samplers, infos in (
        (SAMPLERS, sampler_names.SAMPLERS),
        (FLOW_SAMPLERS, sampler_names.FLOW_SAMPLERS),
        (EDM_SAMPLERS, sampler_names.EDM_SAMPLERS),
    ):
        assert infos == {
            name: sampler_names.SamplerInfo(
                sampler.scheduler.__name__,
                sampler.schedules,
                sampler.min_steps,
                ignored_field(sampler.scheduler, {"rescale_betas_zero_snr": True}) is None,
            )
            for name, sampler in samplers.items()
        }
    for sampler in SAMPLERS.values():  # the only field of a training that some of them lack
        for field, value in (("prediction_type", "v_prediction"), ("trained_betas", [0.1])):
            assert ignored_field(sampler.scheduler, {field: value}) is None
