"""SDXL's refiner: a second expert that takes over for the last steps, with its own encoder and conditions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor, nn

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import Conditioning, Stage, Trajectory
from hypergen.denoising.offload import device_of, turns_of
from hypergen.denoising.schedulers import SchedulerFactory
from hypergen.errors import ModelError
from hypergen.model_store.diffusers_layout import check_folder
from hypergen.models.loading import load_pipeline
from hypergen.models.memory import place
from hypergen.models.text_encoders.clip import ClipEncoder
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache, fill_to
from hypergen.request import GenerationRequest

# The share of the noise schedule that the base model draws; the refiner was trained on the rest.
_TAKES_OVER_AT = 0.8
# How beautiful a picture is asked for and how ugly one is avoided, as diffusers' defaults.
_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


class Refiner:
    """Ensemble of experts, as in section 2.5 of the SDXL paper (https://arxiv.org/abs/2307.01952).

    Args:
        unet: of the base model, whose device and precision the refiner shares.

    Raises:
        ModelError: the folder is no refiner.
    """

    def __init__(self, folder: Path, unet: Any, settings: EngineSettings) -> None:
        check_folder(folder)
        pipeline = load_pipeline(StableDiffusionXLImg2ImgPipeline, folder, unet.dtype, without=["vae"])
        place(pipeline, settings, device_of(unet), turns_of(unet))
        self.unet: Any = pipeline.unet
        if self.unet.config.cross_attention_dim == unet.config.cross_attention_dim:
            raise ModelError(f"{folder} is no refiner of this model: it reads prompts of the same width.")
        self._requires_aesthetics_score: bool = pipeline.config.requires_aesthetics_score
        self._force_zeros: bool = pipeline.config.force_zeros_for_empty_prompt
        encode = ClipEncoder(
            pipeline.tokenizer_2,
            pipeline.text_encoder_2,
            settings,
            unet.dtype,
            penultimate=True,
        )
        with torch.inference_mode():
            self._prompts = PromptCache(encode, settings.prompt_cache_mb * 1_000_000 // 3)

    def read_prompts(self, request: GenerationRequest) -> list[EncodedPrompt]:
        """The prompt and, with guidance, the negative one."""
        texts = [request.prompt]
        if request.guidance_scale > 1:
            texts.append(request.negative_prompt or "")
        return [self._prompts.get(text) for text in texts]

    def stage(
        self, trajectory: Trajectory, width: int, height: int, schedulers: SchedulerFactory
    ) -> Stage | None:
        """The last steps of an image of this size in pixels; None when there are too few steps to share."""
        request, scheduler = trajectory.request, trajectory.scheduler
        trained_steps = scheduler.config.num_train_timesteps
        late = scheduler.timesteps < round((1 - _TAKES_OVER_AT) * trained_steps)
        at_step = len(late) - int(late.sum())
        # A sampler of second order changes hands between its steps, not within one.
        order: int = scheduler.order
        at_step = max(at_step - at_step % order, order)
        if at_step >= len(late) or at_step <= trajectory.step_index:
            return None
        if hasattr(scheduler, "set_begin_index"):  # multistep samplers forget what the other expert said
            scheduler = schedulers.make(request.sampler, request.num_inference_steps)
            scheduler.set_begin_index(at_step)
        positive, negative = self._conditionings(request, width, height)
        return Stage(at_step, positive, negative, scheduler, kind=("refiner",))

    def _conditionings(
        self, request: GenerationRequest, width: int, height: int
    ) -> tuple[Conditioning, Conditioning | None]:
        positive, *negatives = self.read_prompts(request)
        if not negatives:
            return self._conditioning(positive.embeds, positive.pooled, width, height, _AESTHETIC_SCORE), None
        (negative,), empty = negatives, self._prompts.get("").embeds
        length = max(positive.embeds.shape[1], negative.embeds.shape[1])
        unwanted, unwanted_pooled = fill_to(negative.embeds, length, empty), negative.pooled
        assert unwanted_pooled is not None
        if self._force_zeros and not request.negative_prompt:
            unwanted, unwanted_pooled = torch.zeros_like(unwanted), torch.zeros_like(unwanted_pooled)
        wanted = fill_to(positive.embeds, length, empty)
        return (
            self._conditioning(wanted, positive.pooled, width, height, _AESTHETIC_SCORE),
            self._conditioning(unwanted, unwanted_pooled, width, height, _NEGATIVE_AESTHETIC_SCORE),
        )

    def _conditioning(
        self, embeds: Tensor, pooled: Tensor | None, width: int, height: int, score: float
    ) -> Conditioning:
        assert pooled is not None
        # Original size and crop, then the score or, for refiners without one, the target size.
        last = [score] if self._requires_aesthetics_score else [height, width]
        time_ids = torch.tensor([[height, width, 0, 0, *last]], dtype=embeds.dtype, device=embeds.device)
        return Conditioning(embeds, (pooled, time_ids))


class Experts(nn.Module):
    """Base and refiner as one denoiser: prompts are read by the one that was made for their width."""

    def __init__(self, base: Any, refiner: Any) -> None:
        super().__init__()
        self.base = base
        self.refiner = refiner

    def forward(
        self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **others: Any
    ) -> tuple[Tensor, ...]:
        refines = encoder_hidden_states.shape[-1] == self.refiner.config.cross_attention_dim
        unet = self.refiner if refines else self.base
        return unet(latents, timesteps, encoder_hidden_states=encoder_hidden_states, **others)
