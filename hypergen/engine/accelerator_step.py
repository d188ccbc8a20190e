"""A denoising step on an accelerator, in few kernel launches and without a wait of the host.

All numbers of a step go to the device in one copy from pinned memory. Guidance, and the scheduler steps of
all images as linear forms (`denoising/linear_steps.py`), are elementwise operations over the whole batch, so
that no bit of an image depends on the others.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from hypergen.denoising.denoising_state import DenoisingState, ModelInputs, advance_each
from hypergen.denoising.linear_steps import (
    LATENTS,
    Clip,
    LinearForms,
    LinearSampler,
    LinearStep,
    linear_steps,
    next_history,
)
from hypergen.engine.forward_graphs import ForwardGraphs
from hypergen.lora.batched_lora import Loras
from hypergen.lora.manager import denoiser_loras, lora_context
from hypergen.models.family import Family

logger = logging.getLogger(__name__)

_MAX_TABLES = 256


class _SchedulerKey(NamedTuple):
    """What the steps of a scheduler depend on. The scheduler itself does not count in comparisons."""

    kind: type
    config: str
    timesteps: tuple[float, ...]
    first: int


class AcceleratorStep:
    """Predicts and advances batches. Belongs to the engine's thread.

    Args:
        graphs: whether forward passes run as CUDA graphs.
    """

    def __init__(self, family: Family, *, graphs: bool) -> None:
        self._family = family
        self._device = family.device
        self._graphs = ForwardGraphs(family) if graphs else None
        self._stacked: tuple[list[ModelInputs], ModelInputs] | None = None
        self._noise: WeakKeyDictionary[DenoisingState, Future[Tensor]] = WeakKeyDictionary()
        self._noise_thread = ThreadPoolExecutor(1, "noise")
        self._schedulers: dict[_SchedulerKey, Any] = {}
        self._steps = lru_cache(_MAX_TABLES)(self._find_steps)

    def free_memory(self) -> None:
        """Drop the inputs of the last batch."""
        self._stacked = None

    def clear_graphs(self) -> None:
        """Free the memory of CUDA graphs."""
        if self._graphs is not None:
            self._graphs.clear()

    def close(self) -> None:
        self._noise_thread.shutdown()

    def predict(self, states: Sequence[DenoisingState], row_count: int) -> list[Tensor]:
        """Run one forward pass; returns one guided prediction per image, float32, shape (1, C, h, w).

        Args:
            states: of one batch key.
            row_count: pad the batch to this many rows with copies of its last row.
        """
        for state in states:
            self._attach(state)
        guided = [state for state in states if state.guided]
        ordered = [*guided, *(state for state in states if not state.guided)]
        # Negative rows first, as diffusers orders them.
        rows = [*guided, *ordered]
        inputs = [state.negative for state in guided if state.negative is not None]
        inputs += [state.positive for state in ordered]
        padding = max(0, row_count - len(rows))
        rows += rows[-1:] * padding
        inputs += inputs[-1:] * padding
        numbers = self._upload(
            [
                *(_timestep(state) for state in rows),
                *(_input_scale(state) for state in rows),
                *(state.guidance_scale for state in guided),
            ]
        )
        timesteps, scales, guidance = numbers.split([len(rows), len(rows), len(guided)])
        latents = torch.cat([state.latents for state in rows]) * _column(scales)
        noise_pred = self._forward(
            latents.to(self._family.denoiser.dtype),
            timesteps,
            self._stack(rows, inputs),
            states[0].batch_key_extra,
            [denoiser_loras(state.loras) for state in rows],
        )
        # A copy: samplers keep predictions, and a graph writes its next one to the same memory.
        noise_pred = noise_pred[: len(guided) + len(ordered)].to(torch.float32, copy=True)
        negative, positive = noise_pred.split([len(guided), len(ordered)])
        predictions = list(positive.split(1))
        if guided:
            # Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, with guidance_scale = w + 1.
            difference = positive[: len(guided)] - negative
            predictions[: len(guided)] = torch.addcmul(negative, difference, _column(guidance)).split(1)
        by_state = dict(zip(ordered, predictions, strict=True))
        return [by_state[state] for state in states]

    def _forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...],
        loras: list[Loras],
    ) -> Tensor:
        if self._graphs is not None:
            return self._graphs.forward(latents, timesteps, inputs, batch_key_extra, loras)
        with lora_context(self._family.lora_manager, loras):
            return self._family.forward(latents, timesteps, inputs, batch_key_extra=batch_key_extra)

    def advance(
        self, pairs: Sequence[tuple[DenoisingState, Tensor]]
    ) -> Iterator[tuple[DenoisingState, Exception | None]]:
        """Advance each image by its prediction; yields each with the exception of its step, or None."""
        linear = [(state, prediction) for state, prediction in pairs if state.linear is not None]
        try:
            computed = self._compute_steps(linear)
        except Exception as error:  # Isolate the failure: no state was changed, so each can step alone.
            if len(linear) > 1:
                logger.warning("A batched scheduler step failed (%s); stepping each image alone.", error)
                for pair in linear:
                    yield from self.advance([pair])
            else:
                yield linear[0][0], error
        else:
            for (state, _), (latents, history) in zip(linear, computed, strict=True):
                try:
                    self._apply(state, latents, history)
                except Exception as error:  # Isolate the failure: only this image fails.
                    yield state, error
                else:
                    yield state, None
        # A model's own scheduler whose steps are no linear forms; no sampler in requests is such.
        for state, prediction in pairs:
            if state.linear is None:
                yield from advance_each([(state, prediction.to(state.latents.dtype))])
                self._attach(state)

    def _apply(self, state: DenoisingState, latents: Tensor, history: list[Tensor]) -> None:
        self._noise.pop(state, None)
        if state.linear is not None:
            state.linear.history = history
        state.apply_step(latents)
        self._attach(state)

    def _compute_steps(
        self, pairs: Sequence[tuple[DenoisingState, Tensor]]
    ) -> list[tuple[Tensor, list[Tensor]]]:
        """New latents and history of each image, as one sum of products; changes no state."""
        if not pairs:
            return []
        states = [state for state, _ in pairs]
        samplers = [state.linear for state in states if state.linear is not None]
        steps = [sampler.step_at(state.step_index) for sampler, state in zip(samplers, states, strict=True)]
        noise = self._upload_noise(
            [state for state, step in zip(states, steps, strict=True) if step.samples_noise]
        )
        terms = [
            [state.latents, prediction, noise.get(state, state.latents), *sampler.history]
            for (state, prediction), sampler in zip(pairs, samplers, strict=True)
        ]
        self._add_clipped_terms(steps, terms)
        outputs = self._sums_of_products(steps, terms)
        advanced: list[tuple[Tensor, list[Tensor]]] = []
        for step, row, image in zip(steps, terms, outputs, strict=True):
            new = [image[k][None] for k in range(len(step.coefficients))]
            advanced.append((new[0], next_history(step, row, new)))
        return advanced

    def _add_clipped_terms(self, steps: list[LinearStep], terms: list[list[Tensor]]) -> None:
        """Append the clipped latents of images whose steps clip."""
        by_clip: dict[Clip, list[tuple[LinearForms, list[Tensor]]]] = {}
        for step, row in zip(steps, terms, strict=True):
            if step.clipped is not None:
                forms, clip = step.clipped
                by_clip.setdefault(clip, []).append((forms, row))
        for clip, images in by_clip.items():
            rows = [row for _, row in images]
            latents = self._sums_of_products([forms for forms, _ in images], rows)[:, 0]
            for row, clipped in zip(rows, clip.apply(latents).split(1), strict=True):
                row.append(clipped)

    def _sums_of_products(self, forms: Sequence[LinearForms], terms: list[list[Tensor]]) -> Tensor:
        """The outputs of each image's forms, shape (images, outputs, C, h, w), float32.

        One product over the batch for each term. An image with fewer outputs than others has more that say
        nothing.
        """
        most_terms = max(len(form.inputs) for form in forms)
        most_outputs = max(len(form.coefficients) for form in forms)
        # An image with fewer terms or outputs than others gets zeros, times its own latents.
        coefficients = self._upload(
            [
                factor
                for form in forms
                for row in (*form.coefficients, *[()] * (most_outputs - len(form.coefficients)))
                for factor in (*row, *[0.0] * (most_terms - len(row)))
            ]
        ).reshape(len(forms), most_outputs, most_terms, 1, 1, 1)
        stacked = torch.cat(
            [
                row[form.inputs[k]] if k < len(form.inputs) else row[LATENTS]
                for k in range(most_terms)
                for form, row in zip(forms, terms, strict=True)
            ]
        ).float()
        columns = stacked.reshape(most_terms, len(forms), 1, *stacked.shape[1:])
        total = columns[0] * coefficients[:, :, 0]
        for k in range(1, most_terms):
            total = torch.addcmul(total, columns[k], coefficients[:, :, k])
        return total

    def _attach(self, state: DenoisingState) -> None:
        """Give an image the linear steps of its scheduler, and let its next noise be sampled in a thread."""
        if not state.remaining_steps:
            return
        if state.linear is None or state.linear.scheduler is not state.scheduler:
            steps, first = self._steps_of(state.scheduler, state.step_index), state.step_index
            state.linear = None if steps is None else LinearSampler(state.scheduler, steps, first, [])
        if (
            state not in self._noise
            and state.linear is not None
            and state.linear.step_at(state.step_index).samples_noise
        ):
            self._noise[state] = self._noise_thread.submit(self._sample_noise, state)

    def _sample_noise(self, state: DenoisingState) -> Tensor:
        """On the CPU, as diffusers samples it, so that a seed means the same on every device."""
        dtype = self._family.denoiser.dtype
        noise = torch.randn(state.latents.shape, generator=state.generator, dtype=dtype)
        return noise.pin_memory() if self._device.type == "cuda" else noise

    def _upload_noise(self, states: Sequence[DenoisingState]) -> dict[DenoisingState, Tensor]:
        return {
            state: self._noise[state].result().to(self._device, non_blocking=self._device.type == "cuda")
            for state in states
        }

    def _stack(self, rows: Sequence[DenoisingState], inputs: list[ModelInputs]) -> ModelInputs:
        """The model inputs of a batch; those of the last batch again, if it has the same rows."""
        if self._stacked is None or not _same(self._stacked[0], inputs):
            self._stacked = inputs, type(inputs[0]).stack(inputs)
        stacked = self._stacked[1]
        scales = [state.controlnet_scales for state in rows]
        if scales[0] is None:
            return stacked
        steps = [state.step_index for state in rows]
        columns = [s[i : i + 1] for s, i in zip(scales, steps, strict=True) if s is not None]
        return replace(stacked, controlnet_scale=torch.cat(columns))

    def _upload(self, numbers: list[float]) -> Tensor:
        return self._to_device(torch.tensor(numbers, dtype=torch.float32))

    def _to_device(self, tensor: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return tensor.to(self._device)
        return tensor.pin_memory().to(self._device, non_blocking=True)

    def _steps_of(self, scheduler: Any, first: int) -> tuple[LinearStep, ...] | None:
        key = _SchedulerKey(
            type(scheduler),
            str(dict(scheduler.config)),
            tuple(scheduler.timesteps.tolist()),
            first,
        )
        self._schedulers[key] = scheduler
        try:
            return self._steps(key)
        finally:
            del self._schedulers[key]

    def _find_steps(self, key: _SchedulerKey) -> tuple[LinearStep, ...] | None:
        return linear_steps(self._schedulers[key], key.first)


def _column(numbers: Tensor) -> Tensor:
    return numbers.reshape(-1, 1, 1, 1)


def _timestep(state: DenoisingState) -> float:
    return state.linear.step_at(state.step_index).timestep if state.linear else float(state.timestep)


def _input_scale(state: DenoisingState) -> float:
    if state.linear:
        return state.linear.step_at(state.step_index).input_scale
    if not hasattr(state.scheduler, "scale_model_input"):
        return 1.0
    return float(state.scheduler.scale_model_input(torch.ones(1), state.timestep))


def _same(ours: list[ModelInputs], theirs: list[ModelInputs]) -> bool:
    return len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True))
