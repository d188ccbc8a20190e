"""One image on its way from noise to pixels."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from hypergen.request import GenerationRequest


@dataclass(frozen=True, eq=False)
class ModelInputs:
    """What the denoiser reads beside latents and timesteps, for one row or for the rows of a batch.

    The first dimension of each tensor is the rows; None is what a family or request does not have.

    Attributes:
        encoder_hidden_states: prompt embeddings, shape (B, L, D).
        pooled_prompt_embeds: shape (B, D).
        time_ids: SDXL's sizes, crop and, for its refiner, aesthetic score, shape (B, 5 or 6).
        guidance: FLUX.1 dev's distilled guidance scale, shape (B,).
        mask: of an inpainting model, 1 where it generates, shape (B, 1, h, w).
        masked_image_latents: of an inpainting model, the encoded input image without what the mask covers,
            shape (B, C, h, w).
        controlnet_cond: the control image, 0..1, shape (B, 3, H, W).
        controlnet_scale: of the step, shape (B, 1, 1, 1), see `DenoisingState.inputs_at`.
    """

    encoder_hidden_states: Tensor
    pooled_prompt_embeds: Tensor | None = None
    time_ids: Tensor | None = None
    guidance: Tensor | None = None
    mask: Tensor | None = None
    masked_image_latents: Tensor | None = None
    controlnet_cond: Tensor | None = None
    controlnet_scale: Tensor | None = None

    @classmethod
    def stack(cls, rows: Sequence[ModelInputs]) -> ModelInputs:
        """Rows as one batch; they must have the same fields."""
        columns = {name: [getattr(row, name) for row in rows] for name in vars(rows[0])}
        # A tensor that only some rows have is an error of `cat`, and not left out.
        present = {name: tensors for name, tensors in columns.items() if any(t is not None for t in tensors)}
        return cls(**{name: torch.cat(tensors) for name, tensors in present.items()})

    def map(self, change: Callable[[Tensor], Tensor]) -> ModelInputs:
        """The same inputs with each tensor changed, in the order of the fields."""
        present = {name: tensor for name, tensor in vars(self).items() if tensor is not None}
        return ModelInputs(**{name: change(tensor) for name, tensor in present.items()})


@dataclass(frozen=True, eq=False)
class DenoiserSwitch:
    """What an image is drawn with from one of its steps on, in place of what it started with.

    Attributes:
        at_step: index of its first step.
        scheduler: with the same timesteps, about to take that step.
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
        positive, negative: of prompt and negative prompt, in the same shapes; no negative one without
            guidance.
        guidance_scale: how far a prediction is moved away from the negative one.
        generator: the image's own source of noise, on the CPU, so that the seed means the same on every
            device.
        scheduler: the image's own, with the history that multistep samplers keep.
        loras: of the family's `LoraManager`, with their weights, in the order in which they are summed.
        controlnet_scales: of each step, shape (steps, 1, 1, 1); 0 outside of the control image's window.
        after_step: gives the latents to go on with after a step, where something is put back.
        skip_denoising: nothing is drawn, the picture that was sent is the result.
        batch_key_extra: what else rows must have in common to share a batch, such as a ControlNet; see
            `BatchKey`.
        lone: the probe found that neighbours change this shape's bits, and the client asked for a seed: run
            alone.
        next_denoiser: what it goes on with later, if anything.
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
    batch_key_extra: tuple[Hashable, ...] = ()
    controlnet_scales: Tensor | None = None
    after_step: Callable[[DenoisingState], Tensor] | None = None
    skip_denoising: bool = False
    must_run_alone: bool = False
    next_denoiser: DenoiserSwitch | None = None
    step_index: int = 0
    shared_forwards: int = 0
    queued_at: float = field(default_factory=time.monotonic)

    @property
    def seed(self) -> int:
        return self.request.seed + self.index

    @property
    def guided(self) -> bool:
        return self.negative is not None

    @property
    def rows(self) -> int:
        """Rows of a forward pass that one step of this image takes."""
        return 2 if self.guided else 1

    @property
    def timesteps(self) -> Tensor:
        return self.scheduler.timesteps

    @property
    def remaining_steps(self) -> int:
        """Forward passes to go; second-order samplers have nearly two per step asked for."""
        return len(self.timesteps) - self.step_index

    @property
    def timestep(self) -> Tensor:
        return self.timesteps[self.step_index]

    def inputs_at(self, step: int, inputs: ModelInputs) -> ModelInputs:
        """`positive` or `negative` as the denoiser reads it in a step."""
        if self.controlnet_scales is None:
            return inputs
        return replace(inputs, controlnet_scale=self.controlnet_scales[step : step + 1])

    def model_input(self) -> Tensor:
        """The latents as the denoiser wants them at this timestep."""
        if not hasattr(self.scheduler, "scale_model_input"):  # flow matching takes them as they are
            return self.latents
        return self.scheduler.scale_model_input(self.latents, self.timestep)

    def advance(self, noise_pred: Tensor) -> None:
        """Take one step along the prediction, shape (1, C, h, w), guidance already applied."""
        noise = {"generator": self.generator} if self.is_stochastic else {}
        stepped = self.scheduler.step(noise_pred, self.timestep, self.latents, **noise, return_dict=False)
        self.apply_step(stepped[0])

    def apply_step(self, latents: Tensor) -> None:
        """Take over the latents after a step; with the next one another stage may begin."""
        self.latents = latents
        self.step_index += 1
        if self.after_step is not None:
            self.latents = self.after_step(self)
        if self.next_denoiser is not None and self.step_index == self.next_denoiser.at_step:
            stage, self.next_denoiser = self.next_denoiser, None
            self.positive, self.negative = stage.positive, stage.negative
            self.scheduler, self.batch_key_extra, self.controlnet_scales = (
                stage.scheduler,
                stage.batch_key_extra,
                None,
            )

    def with_each_denoiser(self) -> Iterator[DenoisingState]:
        """This image as it is, and as it will be in the stage to come."""
        yield self
        if (stage := self.next_denoiser) is not None:
            changed = {
                "positive": stage.positive,
                "negative": stage.negative,
                "batch_key_extra": stage.batch_key_extra,
            }
            yield replace(
                self, scheduler=stage.scheduler, next_denoiser=None, controlnet_scales=None, **changed
            )
