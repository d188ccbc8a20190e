"""Scheduler steps as linear forms, so that images of all samplers share a few operations on an accelerator.

A step of a noise scheduler is linear in the latents, the prediction, the noise it adds, and what a multistep
sampler keeps of earlier steps. So its coefficients are found by running diffusers' own scheduler once over
unit vectors, for each step, without a line of code for any sampler.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LATENTS, PREDICTION, NOISE = 0, 1, 2
_HISTORY = 3  # the first index of what is kept of earlier steps
_MAX_TERMS = 16
_TOLERANCE = 1e-3
# Settings by which a step is not linear.
_NONLINEAR = ("clip_sample", "thresholding", "stochastic_sampling")


@dataclass(frozen=True)
class LinearStep:
    """One step: `outputs[r] = sum_k coefficients[r][k] * terms[inputs[k]]`; output 0 is the new latents.

    Terms are the latents, the prediction (after guidance), the noise, and the history.

    Attributes:
        inputs: indices of the terms.
        coefficients: one row for each output.
        history: of the next step: index of a term, or `-1 - r` for output r.
        timestep: for the denoiser.
        input_scale: what the latents are multiplied by before the denoiser takes them.
        noised: factors of clean latents and noise, whose sum is as noisy as the latents before this step.
        samples_noise: whether the step takes noise from the image's generator, in the shape of the latents.
    """

    inputs: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]
    history: tuple[int, ...]
    timestep: float
    input_scale: float
    noised: tuple[float, float]
    samples_noise: bool


@dataclass(eq=False)
class LinearSampler:
    """The steps of one image, and what they keep of earlier ones.

    Attributes:
        scheduler: that the steps are of; when an image switches its denoiser, it gets another one.
        first: index of the first step among those of the image.
        history: in float32, each of shape (1, C, h, w).
    """

    scheduler: Any
    steps: tuple[LinearStep, ...]
    first: int
    history: list[Tensor]

    def step_at(self, step_index: int) -> LinearStep:
        return self.steps[step_index - self.first]


def linear_steps(scheduler: Any, first: int = 0) -> tuple[LinearStep, ...] | None:
    """The steps of a scheduler from the first on, which it has not taken yet; None: they are not linear.

    Takes about as long as the same number of steps of a tiny image.
    """
    config = scheduler.config
    if any(config.get(name) for name in _NONLINEAR):
        return None
    try:
        steps = tuple(_find_steps(_copy(scheduler), first))
        return steps if _agree(steps, _copy(scheduler), first) else None
    # What schedulers raise where they cannot begin; the image's own steps then say so.
    except (_NotLinearError, ArithmeticError, LookupError, TypeError, ValueError):
        return None


def apply_step(step: LinearStep, terms: list[Tensor]) -> list[Tensor]:
    """The outputs of a step, one image alone; for tests and for finding out whether steps are linear."""
    return [
        sum(
            (factor * terms[term] for factor, term in zip(row, step.inputs, strict=True)),
            torch.zeros_like(terms[LATENTS]),
        )
        for row in step.coefficients
    ]


def next_history(step: LinearStep, terms: list[Tensor], outputs: list[Tensor]) -> list[Tensor]:
    return [terms[entry] if entry >= 0 else outputs[-1 - entry] for entry in step.history]


def noise_factors(scheduler: Any, timestep: Tensor) -> tuple[float, float]:
    """Factors of clean latents and noise, whose sum is as noisy as latents before the step of a timestep."""
    latents, noise = _unit(LATENTS, 2), _unit(PREDICTION, 2)
    noisy = add_noise(scheduler, latents, noise, timestep)[0]
    return float(noisy[0]), float(noisy[1])


def add_noise(scheduler: Any, latents: Tensor, noise: Tensor, timestep: Tensor) -> Tensor:
    """Add the noise that latents have before the step of a timestep; on the CPU with diffusers' bits."""
    if latents.device.type != "cpu":  # schedulers would move their tables there, and wait
        clean, noisy = noise_factors(scheduler, timestep)
        return clean * latents + noisy * noise
    if hasattr(scheduler, "scale_noise"):  # flow matching interpolates, the others add
        return scheduler.scale_noise(latents, timestep.reshape(1), noise)
    return scheduler.add_noise(latents, noise, timestep.reshape(1))


class _NotLinearError(Exception):
    """A step does something that is no linear form."""


def _copy(scheduler: Any) -> Any:
    """A copy with lists of its own; the tables are not written."""
    copied = copy.copy(scheduler)
    for name, value in vars(copied).items():
        if isinstance(value, list):
            setattr(copied, name, list(value))
    copied.is_scale_input_called = True  # else Euler warns
    return copied


def _find_steps(scheduler: Any, first: int) -> Iterator[LinearStep]:
    """Run the scheduler over unit vectors: element k of each tensor is the coefficient of term k.

    The last element is 0 in all terms, so that it has nothing but noise.
    """
    width = _MAX_TERMS + 1
    generator = torch.Generator().manual_seed(0)
    for timestep in scheduler.timesteps[first:]:
        history = _replace_history(scheduler, width)
        noised = noise_factors(scheduler, timestep)
        scale = 1.0
        if hasattr(scheduler, "scale_model_input"):  # flow matching takes the latents as they are
            scale = float(scheduler.scale_model_input(_unit(LATENTS, width), timestep)[0, LATENTS])
        before = generator.get_state()
        noise_argument = {"generator": generator} if _takes_generator(scheduler) else {}
        latents = scheduler.step(
            _unit(PREDICTION, width), timestep, _unit(LATENTS, width), return_dict=False, **noise_argument
        )[0]
        noise = None
        if not torch.equal(before, after := generator.get_state()):
            generator.set_state(before)
            noise = torch.randn((1, width), generator=generator)
            if not torch.equal(generator.get_state(), after):
                raise _NotLinearError
        rows, entries = _rows_and_entries(latents, _history_of(scheduler, width), noise)
        inputs = tuple(k for k in range(_HISTORY + history) if any(row[k] for row in rows))
        yield LinearStep(
            inputs=inputs,
            coefficients=tuple(tuple(row[k] for k in inputs) for row in rows),
            history=entries,
            timestep=float(timestep),
            input_scale=scale,
            noised=noised,
            samples_noise=noise is not None,
        )


def _takes_generator(scheduler: Any) -> bool:
    return "generator" in inspect.signature(scheduler.step).parameters


def _unit(term: int, width: int) -> Tensor:
    vector = torch.zeros(1, width)
    vector[0, term] = 1
    return vector


def _history_places(scheduler: Any, width: int) -> Iterator[tuple[Any, Any, Tensor]]:
    """Where a scheduler keeps tensors of an image: (container, key, tensor)."""
    for name, value in vars(scheduler).items():
        if isinstance(value, Tensor) and value.shape == (1, width):
            yield vars(scheduler), name, value
        elif isinstance(value, list):
            for index, entry in enumerate(value):
                if isinstance(entry, Tensor) and entry.shape == (1, width):
                    yield value, index, entry


def _history_of(scheduler: Any, width: int) -> list[Tensor]:
    """The tensors that a scheduler keeps of an image, each once."""
    found = {id(tensor): tensor for _, _, tensor in _history_places(scheduler, width)}
    return list(found.values())


def _replace_history(scheduler: Any, width: int) -> int:
    """Put unit vectors in the place of what the scheduler keeps; returns how many."""
    units: dict[int, Tensor] = {}
    for container, key, tensor in list(_history_places(scheduler, width)):
        term = _HISTORY + len(units)
        if term >= _MAX_TERMS:
            raise _NotLinearError
        container[key] = units.setdefault(id(tensor), _unit(term, width))
    return len(units)


def _rows_and_entries(
    latents: Tensor, history: list[Tensor], noise: Tensor | None
) -> tuple[list[list[float]], tuple[int, ...]]:
    """The coefficients of what a step computes, and where the next history is found, see `LinearStep`."""
    rows = [_coefficients(latents, noise)]
    entries: list[int] = []
    for tensor in history:
        row = _coefficients(tensor, noise)
        nonzero = [k for k, factor in enumerate(row) if factor]
        if len(nonzero) == 1 and row[nonzero[0]] == 1:
            entries.append(nonzero[0])
        elif row in rows:
            entries.append(-1 - rows.index(row))
        else:
            rows.append(row)
            entries.append(-len(rows))
    return rows, tuple(entries)


def _coefficients(vector: Tensor, noise: Tensor | None) -> list[float]:
    values = vector[0].double()
    factor = 0.0
    if noise is not None:
        factor = float(values[-1] / noise[0, -1].double())
        values = values - factor * noise[0].double()
        values[values.abs() < 1e-6 * max(1.0, abs(factor))] = 0  # what rounding leaves
    row: list[float] = values[:-1].tolist()
    row[NOISE] = factor
    return row


def _agree(steps: tuple[LinearStep, ...], scheduler: Any, first: int) -> bool:
    """Whether the steps give what the scheduler gives, over all of them, for numbers as latents have them."""
    generator, other = torch.Generator().manual_seed(1), torch.Generator().manual_seed(1)
    source = torch.Generator().manual_seed(2)
    theirs = torch.randn(1, 64, generator=source) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    ours, history = theirs, list[Tensor]()
    noise_argument = {"generator": generator} if _takes_generator(scheduler) else {}
    for step, timestep in zip(steps, scheduler.timesteps[first:], strict=True):
        prediction = torch.randn(1, 64, generator=source)
        theirs = scheduler.step(prediction, timestep, theirs, return_dict=False, **noise_argument)[0]
        noise = torch.randn(1, 64, generator=other) if step.samples_noise else torch.zeros(1, 64)
        terms = [ours, prediction, noise, *history]
        outputs = apply_step(step, terms)
        ours, history = outputs[0], next_history(step, terms, outputs)
        if not torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE * float(theirs.abs().max())):
            return False
    return True
