"""Noise schedulers: public names of samplers and schedules -> diffusers scheduler and its configuration."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from hypergen.errors import SettingError
from hypergen.sampler_names import unknown_scheduler

# A diffusers scheduler: both SchedulerMixin and ConfigMixin, which its stubs cannot express.
Scheduler = Any


# Schedule -> changes to the scheduler configuration, as in diffusers' table of A1111's schedules:
# https://huggingface.co/docs/diffusers/api/schedulers/overview#noise-schedules-and-schedule-types.
# A scheduler class has a schedule if it has its first field.
SCHEDULES: dict[str, dict[str, Any]] = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True, "timestep_spacing": "linspace"},
    "beta": {"use_beta_sigmas": True, "timestep_spacing": "linspace"},
    "sgm_uniform": {"timestep_spacing": "trailing"},
    "simple": {"timestep_spacing": "trailing"},
    "normal": {"timestep_spacing": "linspace"},
}
# Each schedule replaces that of the model, and diffusers refuses two of them.
_SIGMA_FIELDS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")


@dataclass(frozen=True)
class Sampler:
    """A scheduler class, its changes to the model's scheduler configuration, and its fewest steps.

    `own_timesteps`: it takes its timesteps from distillation, so that it has no schedules.
    """

    scheduler: type[Scheduler]
    overrides: dict[str, Any] = field(default_factory=dict)
    min_steps: int = 1
    own_timesteps: bool = False

    @property
    def schedules(self) -> tuple[str, ...]:
        """Names of the schedules that diffusers has for this sampler."""
        fields = inspect.signature(self.scheduler).parameters
        schedules = (name for name, changes in SCHEDULES.items() if next(iter(changes)) in fields)
        return () if self.own_timesteps else tuple(schedules)

    def with_schedule(self, schedule: str) -> Sampler:
        changes = dict.fromkeys(_SIGMA_FIELDS, False) | SCHEDULES[schedule]
        fields = inspect.signature(self.scheduler).parameters
        known = {name: value for name, value in changes.items() if name in fields}
        return replace(self, overrides={**self.overrides, **known})


def find_sampler(name: str, samplers: Mapping[str, Sampler]) -> Sampler:
    """The sampler of a name that may end in a schedule, such as `dpmpp_2m_karras`.

    Raises:
        KeyError: the sampler does not exist, or does not have the schedule.
    """
    for schedule in SCHEDULES:
        sampler = samplers.get(name.removesuffix(f"_{schedule}"))
        if name.endswith(f"_{schedule}") and sampler is not None and schedule in sampler.schedules:
            return sampler.with_schedule(schedule)
    return samplers[name]


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(DDIMScheduler),
    "ddpm": Sampler(DDPMScheduler),
    "deis": Sampler(DEISMultistepScheduler),
    "dpmpp_2m": Sampler(DPMSolverMultistepScheduler),
    "dpmpp_2m_sde": Sampler(DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_3m": Sampler(DPMSolverMultistepScheduler, {"solver_order": 3}),
    "dpmpp_3m_sde": Sampler(
        DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}
    ),
    "dpmpp_sde": Sampler(DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++"}, min_steps=2),
    "dpmpp_singlestep": Sampler(DPMSolverSinglestepScheduler, min_steps=2),
    "euler": Sampler(EulerDiscreteScheduler),
    "euler_a": Sampler(EulerAncestralDiscreteScheduler),
    "heun": Sampler(HeunDiscreteScheduler),
    "kdpm2": Sampler(KDPM2DiscreteScheduler),
    "kdpm2_a": Sampler(KDPM2AncestralDiscreteScheduler),
    "lcm": Sampler(LCMScheduler, own_timesteps=True),
    "lms": Sampler(LMSDiscreteScheduler),
    "pndm": Sampler(PNDMScheduler, {"skip_prk_steps": True}),
    "tcd": Sampler(TCDScheduler, own_timesteps=True),
    "unipc": Sampler(UniPCMultistepScheduler),
}


# For flow matching models.
FLOW_SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(FlowMatchEulerDiscreteScheduler),
    "heun": Sampler(FlowMatchHeunDiscreteScheduler),
}


# For models with the preconditioning of EDM, such as Playground 2.5; any other sampler gives them noise.
EDM_SAMPLERS: dict[str, Sampler] = {
    "dpmpp_2m": Sampler(EDMDPMSolverMultistepScheduler),
    "dpmpp_2m_sde": Sampler(EDMDPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "euler": Sampler(EDMEulerScheduler),
}
# Fields of a scheduler's configuration that say what the model was trained on, and their usual values.
_TRAINED_ON = {"prediction_type": "epsilon", "rescale_betas_zero_snr": False, "trained_betas": None}


def is_edm(scheduler: Scheduler) -> bool:
    return isinstance(scheduler, EDMDPMSolverMultistepScheduler | EDMEulerScheduler)


def ignored_field(scheduler_class: type[Scheduler], config: Mapping[str, Any]) -> str | None:
    """The first field by which a model was trained and which a scheduler class does not have."""
    known = inspect.signature(scheduler_class.__init__).parameters
    return next(
        (
            name
            for name, usual in _TRAINED_ON.items()
            if config.get(name, usual) != usual and name not in known
        ),
        None,
    )


class SchedulerFactory:
    """Makes one scheduler per image, configured like the scheduler that the model was published with.

    Computing the tables of a scheduler takes up to a millisecond, copying a prepared one takes microseconds:
    the factory keeps one prototype per (sampler, steps, image tokens) and returns copies. Tables are on the
    CPU: a step on an accelerator gets their values as numbers, and never waits for one of them.
    """

    _KEPT_PROTOTYPES = 256

    def __init__(self, published: Scheduler) -> None:
        self.published = published
        self.samplers = self._samplers_for(published)
        self._default: str | None = None
        self._without_steps: dict[str | None, Scheduler] = {}  # KDPM2 takes half a second to construct
        self._prototype = functools.lru_cache(self._KEPT_PROTOTYPES)(self._make_prototype)

    def _samplers_for(self, published: Scheduler) -> dict[str, Sampler]:
        """The samplers that use all that the model's configuration says of its training."""
        if is_edm(published):
            return EDM_SAMPLERS
        return {
            name: sampler
            for name, sampler in SAMPLERS.items()
            if ignored_field(sampler.scheduler, published.config) is None
        }

    def set_default(self, sampler: str | None) -> None:
        """The sampler of requests that name none, see `find_sampler`; None: the model's own.

        Raises:
            SettingError: unknown sampler.
        """
        try:
            if sampler is not None:
                find_sampler(sampler, self.samplers)
        except KeyError:
            raise SettingError("scheduler", unknown_scheduler(str(sampler), self.samplers)) from None
        self._default = sampler

    @property
    def min_steps(self) -> int:
        """The fewest steps of the model's own scheduler."""
        if self._default is not None:
            return find_sampler(self._default, self.samplers).min_steps
        published = type(self.published)
        return max((s.min_steps for s in self.samplers.values() if s.scheduler is published), default=1)

    def make(self, sampler: str | None, num_inference_steps: int, image_tokens: int = 0) -> Scheduler:
        """A new scheduler for one image, with its timesteps set.

        Args:
            sampler: name, which may end in a schedule, see `find_sampler`. None: the model's own.
            image_tokens: number of patches, for models whose timesteps depend on the image size.
        """
        scheduler = copy.copy(self._prototype(sampler or self._default, num_inference_steps, image_tokens))
        # Tensors are shared, they are never written to. Lists hold the multistep history of one image.
        for name, value in vars(scheduler).items():
            if isinstance(value, list):
                setattr(scheduler, name, list(value))
        # Otherwise a scheduler looks up its position by timestep, ambiguous for second-order samplers.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler

    def _make_prototype(self, sampler: str | None, num_inference_steps: int, image_tokens: int) -> Scheduler:
        if sampler not in self._without_steps:
            own = Sampler(type(self.published))
            entry = own if sampler is None else find_sampler(sampler, self.samplers)
            self._without_steps[sampler] = self._configured(entry)
        scheduler = copy.copy(self._without_steps[sampler])
        self._set_timesteps(scheduler, num_inference_steps, image_tokens)
        return scheduler

    def _configured(self, sampler: Sampler) -> Scheduler:
        return sampler.scheduler.from_config(self.published.config, **sampler.overrides)

    def _set_timesteps(self, scheduler: Scheduler, num_inference_steps: int, image_tokens: int) -> None:
        # LCM takes its steps from the 50 that it was distilled on, and raises for more.
        if num_inference_steps > scheduler.config.get("original_inference_steps", num_inference_steps):
            scheduler.register_to_config(original_inference_steps=num_inference_steps)
        scheduler.set_timesteps(num_inference_steps)


class FlowSchedulerFactory(SchedulerFactory):
    """Schedulers of flow matching models, whose timesteps may shift with the image size.

    Args:
        sigmas_end_at_last_step: pass sigmas from 1 down to 1 / steps to schedulers that accept them;
            otherwise schedulers compute their own.
    """

    def __init__(self, published: Scheduler, *, sigmas_end_at_last_step: bool) -> None:
        super().__init__(published)
        self._sigmas_end_at_last_step = sigmas_end_at_last_step
        self._shifts: bool = published.config.get("use_dynamic_shifting", False)

    def _samplers_for(self, published: Scheduler) -> dict[str, Sampler]:
        return FLOW_SAMPLERS

    def _configured(self, sampler: Sampler) -> Scheduler:
        # Heun's scheduler has a fixed shift only; `_set_timesteps` sets it.
        fixed = {"shift": 1.0} if self._shifts and not _takes_mu(sampler.scheduler) else {}
        return sampler.scheduler.from_config(self.published.config, **sampler.overrides, **fixed)

    def _set_timesteps(self, scheduler: Scheduler, num_inference_steps: int, image_tokens: int) -> None:
        arguments: dict[str, Any] = {}
        if self._shifts and _takes_mu(scheduler):
            arguments["mu"] = self._shift_exponent(image_tokens)
        elif self._shifts:
            # A fixed shift of e^mu gives the same sigmas, see `time_shift` of the Euler scheduler.
            scheduler.register_to_config(shift=math.exp(self._shift_exponent(image_tokens)))
        if self._sigmas_end_at_last_step and _takes_mu(scheduler):
            arguments["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, **arguments)

    def _shift_exponent(self, image_tokens: int) -> float:
        config = self.published.config
        return calculate_shift(
            image_tokens,
            config["base_image_seq_len"],
            config["max_image_seq_len"],
            config["base_shift"],
            config["max_shift"],
        )


def _takes_mu(scheduler: Scheduler) -> bool:
    return "mu" in inspect.signature(scheduler.set_timesteps).parameters


def takes_generator(scheduler: Scheduler) -> bool:
    """Whether `scheduler.step` samples noise and takes a generator for it."""
    return "generator" in inspect.signature(scheduler.step).parameters
