"""The denoising state of one image, and the inputs of the denoiser."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hypergen.denoising.linear_steps import LinearSampler
from hypergen.request import GenerationRequest


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """Inputs of the denoiser other than latents and timesteps, for one row or for a batch.

    The first dimension of each tensor is the batch; None: the family or the request does not use it. A family
    with other inputs, such as an attention mask, adds them in a subclass.

    Attributes:
        encoder_hidden_states: prompt embeddings, shape (B, L, D).
        pooled_prompt_embeds: shape (B, D).
        time_ids: SDXL's sizes, crop and, for its refiner, aesthetic score, shape (B, 5 or 6).
        guidance: FLUX.1 dev's distilled guidance scale, shape (B,).
        mask: input of inpainting models, 1 in the region to generate, shape (B, 1, h, w).
        masked_image_latents: input of inpainting models, the encoded input image with the masked region
            blanked, shape (B, C, h, w).
        controlnet_cond: the control image, 0..1, shape (B, 3, H, W).
        controlnet_scale: of the current step, shape (B, 1, 1, 1), see `DenoisingState.inputs_at`.
    """

    encoder_hidden_states: Tensor
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    guidance: Tensor | None = None
    mask: Tensor | None = None
    masked_image_latents: Tensor | None = None
    controlnet_cond: Tensor | None = None
    controlnet_scale: Tensor | None = None

    @staticmethod
    def stack(rows: Sequence[ModelInputs]) -> ModelInputs:
        """Concatenate rows into one batch; they must have the same fields."""
        columns = {name: [getattr(row, name) for row in rows] for name in vars(rows[0])}
        # A field that only some rows have makes `cat` raise.
        present = {name: tensors for name, tensors in columns.items() if any(t is not None for t in tensors)}
        return type(rows[0])(**{name: torch.cat(tensors) for name, tensors in present.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelInputs:
        """Apply a function to each tensor, in the order of the fields."""
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return replace(self, **{name: change(tensor) for name, tensor in present.items()})


@dataclass(frozen=True, eq=False)
class DenoiserSwitch:
    """The switch to another denoiser at one of an image's steps, such as SDXL's refiner.

    Attributes:
        at_step: index of the first step of the next denoiser.
        positive, negative: its inputs.
        scheduler: with the same timesteps, positioned at that step.
    """

    at_step: int
    positive: ModelInputs
    negative: ModelInputs | None
    scheduler: Any
    batch_key_extra: tuple[Hashable, ...]


@dataclass(kw_only=True, eq=False)
class DenoisingState:
    """The state of one image between two denoising steps; a request for n images makes n of them.

    Attributes:
        latents: shape (1, C, h, w), h and w in latent pixels.
        positive, negative: inputs for the prompt and the negative prompt, in the same shapes; `negative` is
            None without classifier-free guidance.
        guidance_scale: of classifier-free guidance.
        generator: for all noise of this image, on the CPU, so that a seed gives the same noise on every
            device.
        scheduler: this image's own copy; multistep schedulers keep a history.
        is_stochastic: the scheduler samples noise in its steps.
        loras: from the family's `LoraManager`, with their weights, in the order in which they are summed.
        lora_sizes: see `accelerator_batch.product_sizes`.
        batch_key_extra: anything else that the rows of a batch must share, such as a ControlNet; see
            `BatchKey`.
        controlnet_scales: per step, shape (steps, 1, 1, 1); 0 outside the ControlNet's window.
        after_step: returns the latents after a step; inpainting restores the kept region here.
        skip_denoising: no step runs; the input image is the result.
        must_run_alone: batching changes the bits of this shape, and the client sent a seed.
        next_denoiser: the switch to another denoiser at a later step.
        forwards: forward passes so far.
        shared_forwards: those of them that were shared with images of other requests.
        batch_images: images in this image's forward passes so far, in total.
        denoised_at: monotonic time of the last step; before that, of the preparation.
        linear: on an accelerator, the scheduler's steps as linear forms, where they are.
    """

    request: GenerationRequest
    index: int
    latents: Tensor
    positive: ModelInputs
    negative: ModelInputs | None
    guidance_scale: float
    prompt_tokens: int
    generator: torch.Generator
    scheduler: Any
    is_stochastic: bool
    loras: tuple[tuple[Any, float], ...] = ()
    lora_sizes: frozenset[int] = frozenset()
    batch_key_extra: tuple[Hashable, ...] = ()
    controlnet_scales: Tensor | None = None
    after_step: Callable[[DenoisingState], Tensor] | None = None
    skip_denoising: bool = False
    must_run_alone: bool = False
    next_denoiser: DenoiserSwitch | None = None
    step_index: int = 0
    shared_forwards: int = 0
    forwards: int = 0
    batch_images: int = 0
    denoised_at: float = field(default_factory=time.monotonic)
    linear: LinearSampler | None = None
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def seed(self) -> int:
        return self.request.seed + self.index

    @property
    def guided(self) -> bool:
        return self.negative is not None

    @property
    def rows(self) -> int:
        """Rows in a forward pass: one, or two with guidance."""
        return 2 if self.guided else 1

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps

    @property
    def remaining_steps(self) -> int:
        """Remaining forward passes; second-order samplers need nearly two per requested step."""
        return len(self.timesteps) - self.step_index

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.step_index]

    def inputs_at(self, step: int, inputs: ModelInputs) -> ModelInputs:
        """`positive` or `negative`, with the ControlNet scale of a step."""
        if self.controlnet_scales is None:
            return inputs
        return replace(inputs, controlnet_scale=self.controlnet_scales[step : step + 1])

    def model_input(self) -> Tensor:
        """The latents, scaled for the denoiser at the current timestep."""
        if self.linear is not None:
            return self.latents * self.linear.step_at(self.step_index).input_scale
        if not hasattr(self.scheduler, "scale_model_input"):  # flow matching does not scale
            return self.latents
        return self.scheduler.scale_model_input(self.latents, self.timestep)

    def advance(self, noise_pred: Tensor) -> None:
        """Run one scheduler step on a prediction of shape (1, C, h, w), guidance already applied."""
        noise = {"generator": self.generator} if self.is_stochastic else {}
        output = self.scheduler.step(noise_pred, self.timestep, self.latents, **noise, return_dict=False)
        self.apply_step(output[0])

    def apply_step(self, latents: Tensor) -> None:
        """Store the latents of a finished step, and switch the denoiser if it is time."""
        self.latents = latents
        self.step_index += 1
        if self.after_step is not None:
            self.latents = self.after_step(self)
        if self.next_denoiser is not None and self.step_index == self.next_denoiser.at_step:
            switch, self.next_denoiser = self.next_denoiser, None
            self.positive, self.negative = switch.positive, switch.negative
            self.scheduler, self.batch_key_extra = switch.scheduler, switch.batch_key_extra
            self.controlnet_scales = None
            self.loras, self.lora_sizes = (), frozenset()  # only the first denoiser has them

    def with_each_denoiser(self) -> Iterator[DenoisingState]:
        """This state, and the state after the switch to the next denoiser."""
        yield self
        if (switch := self.next_denoiser) is not None:
            yield replace(
                self,
                positive=switch.positive,
                negative=switch.negative,
                scheduler=switch.scheduler,
                batch_key_extra=switch.batch_key_extra,
                controlnet_scales=None,
                next_denoiser=None,
            )


def advance_each(
    pairs: Iterable[tuple[DenoisingState, Tensor]],
) -> Iterator[tuple[DenoisingState, Exception | None]]:
    """Advance each image by its prediction; yields each with the exception of its step, or None."""
    for state, noise_pred in pairs:
        try:
            state.advance(noise_pred)
        except Exception as error:  # Isolate the failure: only this image fails.
            yield state, error
        else:
            yield state, None
