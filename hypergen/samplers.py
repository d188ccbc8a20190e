"""Samplers: public name -> diffusers scheduler and what to set in it."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

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
    "dpmpp_singlestep": Sampler(DPMSolverSinglestepScheduler, min_steps=2),
    "euler": Sampler(EulerDiscreteScheduler),
    "euler_karras": Sampler(EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    "euler_a": Sampler(EulerAncestralDiscreteScheduler),
    "heun": Sampler(HeunDiscreteScheduler),
    "kdpm2": Sampler(KDPM2DiscreteScheduler),
    "lcm": Sampler(LCMScheduler),
    "pndm": Sampler(PNDMScheduler, {"skip_prk_steps": True}),
    "unipc": Sampler(UniPCMultistepScheduler),
}


class SchedulerFactory:
    """Makes one scheduler per image, from the scheduler that the model was published with.

    Computing the tables of a scheduler takes up to a millisecond; copying a finished one takes microseconds.
    So the factory keeps one prototype per (sampler, steps) and hands out copies.
    """

    _KEPT_PROTOTYPES = 256

    def __init__(self, published: Scheduler, device: torch.device) -> None:
        self.published = published
        self._device = device
        self._without_steps: dict[str | None, Scheduler] = {}  # making one takes KDPM2 half a second
        self._prototypes: OrderedDict[tuple[str | None, int], Scheduler] = OrderedDict()

    @property
    def min_steps(self) -> int:
        """The fewest steps that the model's own scheduler can do."""
        same = [entry.min_steps for entry in SAMPLERS.values() if type(self.published) is entry.scheduler]
        return max(same, default=1)

    def make(self, sampler: str | None, num_inference_steps: int) -> Scheduler:
        """A scheduler of its own for one image, timesteps set; `sampler` None is the model's own."""
        key = (sampler, num_inference_steps)
        if key not in self._prototypes:
            self._prototypes[key] = self._prototype(sampler, num_inference_steps)
            if len(self._prototypes) > self._KEPT_PROTOTYPES:
                self._prototypes.popitem(last=False)
        self._prototypes.move_to_end(key)
        scheduler = copy.copy(self._prototypes[key])
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

    def _prototype(self, sampler: str | None, num_inference_steps: int) -> Scheduler:
        if sampler not in self._without_steps:
            entry = Sampler(type(self.published)) if sampler is None else SAMPLERS[sampler]
            config = self.published.config
            self._without_steps[sampler] = entry.scheduler.from_config(config, **entry.overrides)
        scheduler = copy.copy(self._without_steps[sampler])
        # LCM picks its steps from those it was distilled on, 50, and refuses more.
        if num_inference_steps > scheduler.config.get("original_inference_steps", num_inference_steps):
            scheduler.register_to_config(original_inference_steps=num_inference_steps)
        scheduler.set_timesteps(num_inference_steps, device=self._device)
        return scheduler


def takes_generator(scheduler: Scheduler) -> bool:
    """Whether `scheduler.step` draws noise and wants the image's generator for it."""
    return "generator" in inspect.signature(scheduler.step).parameters
