"""Samplers: public name -> diffusers scheduler and what to set in it."""

from __future__ import annotations

import copy
import functools
import inspect
import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    TCDScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

# A diffusers scheduler: SchedulerMixin and ConfigMixin at once, which its stubs cannot say.
Scheduler = Any


@dataclass(frozen=True)
class Sampler:
    """A scheduler class, what differs from the model's scheduler configuration, and the fewest steps."""

    scheduler: type[Scheduler]
    overrides: dict[str, Any] = field(default_factory=dict)
    min_steps: int = 1


SAMPLERS: dict[str, Sampler] = {
    "ddim": Sampler(DDIMScheduler),
    "ddpm": Sampler(DDPMScheduler),
    "dpmpp_2m": Sampler(DPMSolverMultistepScheduler),
    "dpmpp_2m_karras": Sampler(DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": Sampler(DPMSolverMultistepScheduler, {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": Sampler(DPMSolverSinglestepScheduler, {"algorithm_type": "sde-dpmsolver++"}, min_steps=2),
    "dpmpp_singlestep": Sampler(DPMSolverSinglestepScheduler, min_steps=2),
    "euler": Sampler(EulerDiscreteScheduler),
    "euler_karras": Sampler(EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_a": Sampler(EulerAncestralDiscreteScheduler),
    "heun": Sampler(HeunDiscreteScheduler),
    "kdpm2": Sampler(KDPM2DiscreteScheduler),
    "lcm": Sampler(LCMScheduler),
    "lms": Sampler(LMSDiscreteScheduler),
    "pndm": Sampler(PNDMScheduler, {"skip_prk_steps": True}),
    "tcd": Sampler(TCDScheduler),
    "unipc": Sampler(UniPCMultistepScheduler),
}


# For models that predict the flow from noise to picture.
FLOW_SAMPLERS: dict[str, Sampler] = {
    "euler": Sampler(FlowMatchEulerDiscreteScheduler),
    "heun": Sampler(FlowMatchHeunDiscreteScheduler),
}


class SchedulerFactory:
    """Makes one scheduler per image, from the scheduler that the model was published with.

    Computing the tables of a scheduler takes up to a millisecond; copying a finished one takes microseconds.
    So the factory keeps one prototype per (sampler, steps) and hands out copies.
    """

    _KEPT_PROTOTYPES = 256
    samplers = SAMPLERS

    def __init__(self, published: Scheduler, device: torch.device) -> None:
        self.published = published
        self._device = device
        self._without_steps: dict[str | None, Scheduler] = {}  # making one takes KDPM2 half a second
        self._prototype = functools.lru_cache(self._KEPT_PROTOTYPES)(self._make_prototype)

    @property
    def min_steps(self) -> int:
        """The fewest steps that the model's own scheduler can do."""
        same = [
            entry.min_steps for entry in self.samplers.values() if type(self.published) is entry.scheduler
        ]
        return max(same, default=1)

    def make(self, sampler: str | None, num_inference_steps: int, image_tokens: int = 0) -> Scheduler:
        """A scheduler of its own for one image, timesteps set.

        Args:
            sampler: None is the model's own.
            image_tokens: patches of the image, for models whose timesteps depend on its size.
        """
        scheduler = copy.copy(self._prototype(sampler, num_inference_steps, image_tokens))
        # Tables are shared, they are never written; the lists are the multistep history and belong to one
        # image.
        for name, value in vars(scheduler).items():
            if isinstance(value, list):
                setattr(scheduler, name, list(value))
        # Without it a scheduler searches its position by timestep, which is ambiguous for second-order
        # samplers.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
        return scheduler

    def _make_prototype(self, sampler: str | None, num_inference_steps: int, image_tokens: int) -> Scheduler:
        if sampler not in self._without_steps:
            entry = Sampler(type(self.published)) if sampler is None else self.samplers[sampler]
            self._without_steps[sampler] = self._configured(entry)
        scheduler = copy.copy(self._without_steps[sampler])
        self._set_timesteps(scheduler, num_inference_steps, image_tokens)
        return scheduler

    def _configured(self, sampler: Sampler) -> Scheduler:
        return sampler.scheduler.from_config(self.published.config, **sampler.overrides)

    def _set_timesteps(self, scheduler: Scheduler, num_inference_steps: int, image_tokens: int) -> None:
        # LCM picks its steps from those it was distilled on, 50, and refuses more.
        if num_inference_steps > scheduler.config.get("original_inference_steps", num_inference_steps):
            scheduler.register_to_config(original_inference_steps=num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device=self._device)


class FlowSchedulerFactory(SchedulerFactory):
    """The same for models that predict flow, whose timesteps may shift with the size of the image.

    Args:
        sigmas_end_at_last_step: whether the model wants its sigmas from 1 down to 1 / steps, where the
            scheduler can be given any; else they are the scheduler's own.
    """

    samplers = FLOW_SAMPLERS

    def __init__(self, published: Scheduler, device: torch.device, *, sigmas_end_at_last_step: bool) -> None:
        super().__init__(published, device)
        self._sigmas_end_at_last_step = sigmas_end_at_last_step
        self._shifts: bool = published.config.get("use_dynamic_shifting", False)

    def _configured(self, sampler: Sampler) -> Scheduler:
        # Heun's scheduler knows a fixed shift only; ours is put in with the timesteps.
        fixed = {"shift": 1.0} if self._shifts and not _takes_mu(sampler.scheduler) else {}
        return sampler.scheduler.from_config(self.published.config, **sampler.overrides, **fixed)

    def _set_timesteps(self, scheduler: Scheduler, num_inference_steps: int, image_tokens: int) -> None:
        arguments: dict[str, Any] = {}
        if self._shifts and _takes_mu(scheduler):
            arguments["mu"] = self._shift_exponent(image_tokens)
        elif self._shifts:
            # e^mu as a fixed shift gives the same sigmas, see `time_shift` of the Euler scheduler.
            scheduler.register_to_config(shift=math.exp(self._shift_exponent(image_tokens)))
        if self._sigmas_end_at_last_step and _takes_mu(scheduler):
            arguments["sigmas"] = np.linspace(1.0, 1 / num_inference_steps, num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device=self._device, **arguments)

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
    """Whether `scheduler.step` draws noise and wants the image's generator for it."""
    return "generator" in inspect.signature(scheduler.step).parameters
