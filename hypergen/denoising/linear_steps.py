"""Scheduler steps as linear forms, so that images of all samplers share a few operations on an accelerator.

A step of a noise scheduler is linear in the latents, the prediction, the noise it adds, and what a multistep
sampler keeps of earlier steps. So its coefficients are found by running diffusers' own scheduler once over
unit vectors, for each step, without a line of code for any sampler. Where a scheduler clips its predicted
clean latents (`clip_sample`, `thresholding`), those are a linear form too, and the clipped ones are one term
more.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

LATENTS, PREDICTION, NOISE = 0, 1, 2
_HISTORY = 3  # the first index of what is kept of earlier steps
_MAX_TERMS = 16
_TOLERANCE = 1e-3
_TRIED = (1, 4, 4, 4)  # the shape of latents with which steps are compared with the scheduler's


@dataclass(frozen=True)
class LinearForms:
    """Sums of products: `outputs[r] = sum_k coefficients[r][k] * terms[inputs[k]]`.

    Terms are the latents, the prediction (after guidance), the noise, and the history; where a step clips,
    the clipped latents are the last one.

    Attributes:
        inputs: indices of the terms.
        coefficients: one row for each output.
    """

    inputs: tuple[int, ...]
    coefficients: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Clip:
    """How a scheduler clips its predicted clean latents.

    Attributes:
        limit: `clip_sample_range`, or `sample_max_value` of dynamic thresholding.
        ratio: `dynamic_thresholding_ratio`; None: no dynamic thresholding.
    """

    limit: float
    ratio: float | None = None

    def apply(self, latents: Tensor) -> Tensor:
        """Clip a batch, shape (B, ...), each of it alone."""
        if self.ratio is None:
            return latents.clamp(-self.limit, self.limit)
        # Saharia et al. 2022, https://arxiv.org/abs/2205.11487, section 2.3.
        magnitudes = latents.abs().flatten(1)
        rank = self.ratio * (magnitudes.shape[1] - 1)
        # `torch.quantile` has more than twice the kernel launches.
        count = magnitudes.shape[1] - int(rank)
        largest = magnitudes.topk(count).values
        quantiles = largest[:, -1].lerp(largest[:, max(0, count - 2)], rank % 1)
        thresholds = quantiles.clamp(1, self.limit).reshape(-1, *[1] * (latents.ndim - 1))
        return (latents / thresholds).clamp(-1, 1)


@dataclass(frozen=True)
class LinearStep(LinearForms):
    """One step; output 0 is the new latents.

    Attributes:
        clipped: the predicted clean latents, where the step clips them, and how.
        history: of the next step: index of a term, or `-1 - r` for output r.
        timestep: for the denoiser.
        input_scale: what the latents are multiplied by before the denoiser takes them.
        noised: factors of clean latents and noise, whose sum is as noisy as the latents before this step.
        samples_noise: whether the step takes noise from the image's generator, in the shape of the latents.
    """

    clipped: tuple[LinearForms, Clip] | None
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
    try:
        steps = tuple(_find_steps(_copy(scheduler), first))
        return steps if _agree(steps, _copy(scheduler), first) else None
    # What schedulers raise where they cannot begin; the image's own steps then say so. Some lack `add_noise`.
    except (_NotLinearError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
        return None


def apply_step(step: LinearStep, terms: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """The new latents and history of one image; for tests and for finding out whether steps are linear."""
    if step.clipped is not None:
        forms, clip = step.clipped
        terms = [*terms, clip.apply(_sums(forms, terms)[0])]
    outputs = _sums(step, terms)
    return outputs[0], next_history(step, terms, outputs)


def _sums(forms: LinearForms, terms: list[Tensor]) -> list[Tensor]:
    return [
        sum(
            (factor * terms[term] for factor, term in zip(row, forms.inputs, strict=True)),
            torch.zeros_like(terms[LATENTS]),
        )
        for row in forms.coefficients
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


class _ClipAsTerm(TorchFunctionMode):
    """Gives a scheduler a unit vector for the latents that it clips, and keeps what it wanted to clip."""

    def __init__(self, scheduler: Any, term: int, width: int) -> None:
        super().__init__()
        self._unit = _unit(term, width)
        self.clipped: tuple[LinearForms, Clip] | None = None
        config = scheduler.config
        if config.get("thresholding") and hasattr(scheduler, "_threshold_sample"):
            clip = Clip(config.sample_max_value, config.dynamic_thresholding_ratio)
            scheduler._threshold_sample = partial(self._keep, clip=clip)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in (torch.clamp, Tensor.clamp) or args[0].shape != self._unit.shape:
            return func(*args, **kwargs)
        low, high = _limits(*args, **kwargs)
        if low != -high:
            raise _NotLinearError
        return self._keep(args[0], Clip(float(high)))

    def _keep(self, latents: Tensor, clip: Clip) -> Tensor:
        if self.clipped is not None:
            raise _NotLinearError
        row = _coefficients(latents, None)
        inputs = tuple(k for k, factor in enumerate(row) if factor)
        self.clipped = LinearForms(inputs, (tuple(row[k] for k in inputs),)), clip
        return self._unit


def _limits(latents: Tensor, min: float, max: float) -> tuple[float, float]:
    """The limits that `clamp` gets, by position or by name."""
    return min, max


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
        with _ClipAsTerm(scheduler, _HISTORY + history, width) as clipping:
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
        inputs = tuple(k for k in range(_MAX_TERMS) if any(row[k] for row in rows))
        yield LinearStep(
            inputs=inputs,
            coefficients=tuple(tuple(row[k] for k in inputs) for row in rows),
            clipped=clipping.clipped,
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
        if term >= _MAX_TERMS - 1:  # the last one is for clipped latents
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
    theirs = torch.randn(_TRIED, generator=source) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    ours, history = theirs, list[Tensor]()
    noise_argument = {"generator": generator} if _takes_generator(scheduler) else {}
    for step, timestep in zip(steps, scheduler.timesteps[first:], strict=True):
        prediction = torch.randn(_TRIED, generator=source)
        theirs = scheduler.step(prediction, timestep, theirs, return_dict=False, **noise_argument)[0]
        noise = torch.randn(_TRIED, generator=other) if step.samples_noise else torch.zeros(_TRIED)
        ours, history = apply_step(step, [ours, prediction, noise, *history])
        if not torch.allclose(ours, theirs, rtol=_TOLERANCE, atol=_TOLERANCE * float(theirs.abs().max())):
            return False
    return True
