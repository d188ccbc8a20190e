"""SDXL's refiner: a second denoiser for the last steps, with its own text encoder and conditioning."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLImg2ImgPipeline
from torch import Tensor, nn

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoiserSwitch, DenoisingState, ModelInputs
from hypergen.denoising.offload import device_of, offloader_of
from hypergen.denoising.schedulers import SchedulerFactory
from hypergen.lora.batched_lora import Loras
from hypergen.lora.textual_inversion import Embeddings
from hypergen.models.family import PromptEmbeds
from hypergen.models.loading import load_pipeline
from hypergen.models.memory import apply_memory_settings, direct_device
from hypergen.models.text_encoders.clip import ClipEncoder
from hypergen.models.text_encoders.prompt_cache import PromptCache, pad_with_empty_chunks
from hypergen.request import GenerationRequest

# The share of the noise schedule of the base model; the refiner was trained on the rest.
_SWITCH_AT = 0.8
# diffusers' defaults.
_AESTHETIC_SCORE, _NEGATIVE_AESTHETIC_SCORE = 6.0, 2.5


class Refiner:
    """Ensemble of experts, as in section 2.5 of the SDXL paper (https://arxiv.org/abs/2307.01952).

    Args:
        unet: of the base model; the refiner gets its device and dtype.
        embeddings: textual inversions of the base model, whose second text encoder is the refiner's.

    Raises:
        ModelError: it cannot be loaded.
    """

    def __init__(self, folder: Path, unet: Any, settings: EngineSettings, embeddings: Embeddings) -> None:
        device = device_of(unet)
        pipeline = load_pipeline(
            StableDiffusionXLImg2ImgPipeline,
            folder,
            unet.dtype,
            direct_device(settings, device),
            without=["vae"],
        )
        apply_memory_settings(pipeline, settings, device, offloader_of(unet))
        self.unet: Any = pipeline.unet
        self.modules: tuple[nn.Module, ...] = (pipeline.unet, pipeline.text_encoder_2)
        self._requires_aesthetics_score: bool = pipeline.config.requires_aesthetics_score
        self._force_zeros: bool = pipeline.config.force_zeros_for_empty_prompt
        encode = ClipEncoder(
            pipeline.tokenizer_2,
            pipeline.text_encoder_2,
            settings,
            unet.dtype,
            penultimate=True,
            embeddings=embeddings,
            component="text_encoder_2",
        )
        with torch.inference_mode():
            self.prompts = PromptCache(encode, settings.prompt_cache_mb * 1_000_000 // 3)

    def encode_prompts(self, request: GenerationRequest, loras: Loras) -> PromptEmbeds:
        """Of the LoRAs only bundled textual inversions apply: their layers are those of the base model."""
        loras = tuple((lora, weight) for lora, weight in loras if lora.embeddings)
        positive = self.prompts.get(request.prompt, loras)
        embeds = positive.embeds
        if request.guidance_scale <= 1:
            return PromptEmbeds(ModelInputs(embeds, positive.pooled), None, positive.tokens)
        negative_prompt = self.prompts.get(request.negative_prompt or "", loras)
        length = max(embeds.shape[1], negative_prompt.embeds.shape[1])
        empty = self.prompts.get("").embeds
        padded = pad_with_empty_chunks(negative_prompt.embeds, length, empty)
        negative = ModelInputs(padded, negative_prompt.pooled)
        if self._force_zeros and not request.negative_prompt:
            negative = negative.map(torch.zeros_like)
        embeds = pad_with_empty_chunks(embeds, length, empty)
        return PromptEmbeds(ModelInputs(embeds, positive.pooled), negative, positive.tokens)

    def switch(
        self,
        state: DenoisingState,
        prompts: PromptEmbeds,
        width: int,
        height: int,
        schedulers: SchedulerFactory,
    ) -> DenoiserSwitch | None:
        """The switch of an image of this size in pixels to the refiner; None: it has too few steps."""
        request, scheduler = state.request, state.scheduler
        trained_steps = scheduler.config.num_train_timesteps
        is_late = scheduler.timesteps < round((1 - _SWITCH_AT) * trained_steps)
        at_step = len(is_late) - int(is_late.sum())
        # Second-order schedulers switch between their steps, not within one.
        order: int = scheduler.order
        at_step = max(at_step - at_step % order, order)
        if at_step >= len(is_late) or at_step <= state.step_index:
            return None
        if hasattr(scheduler, "set_begin_index"):  # multistep schedulers start with an empty history
            scheduler = schedulers.make(request.sampler, request.num_inference_steps)
            scheduler.set_begin_index(at_step)
        positive = self._with_size(prompts.positive, width, height, _AESTHETIC_SCORE)
        negative = prompts.negative
        if negative is not None:
            negative = self._with_size(negative, width, height, _NEGATIVE_AESTHETIC_SCORE)
        return DenoiserSwitch(at_step, positive, negative, scheduler, batch_key_extra=("refiner",))

    def _with_size(self, inputs: ModelInputs, width: int, height: int, score: float) -> ModelInputs:
        # Original size and crop, then the aesthetic score or, for refiners without one, the target size.
        score_or_size = [score] if self._requires_aesthetics_score else [height, width]
        embeds = inputs.encoder_hidden_states
        time_ids = torch.tensor(
            [[height, width, 0, 0, *score_or_size]], dtype=embeds.dtype, device=embeds.device
        )
        return replace(inputs, time_ids=time_ids)


class Experts(nn.Module):
    """Base and refiner UNet as one denoiser; the width of the prompt embeddings selects one."""

    def __init__(self, base: Any, refiner: Any) -> None:
        super().__init__()
        self.base = base
        self.refiner = refiner
        self.config, self.dtype = base.config, base.dtype

    @property
    def device(self) -> torch.device:
        return device_of(self.base)

    def forward(
        self, latents: Tensor, timesteps: Tensor, encoder_hidden_states: Tensor, **kwargs: Any
    ) -> tuple[Tensor, ...]:
        is_refiner = encoder_hidden_states.shape[-1] == self.refiner.config.cross_attention_dim
        unet = self.refiner if is_refiner else self.base
        return unet(latents, timesteps, encoder_hidden_states=encoder_hidden_states, **kwargs)
