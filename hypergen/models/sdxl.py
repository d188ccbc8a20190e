"""Stable Diffusion XL, SDXL Turbo and SSD-1B: two CLIP text encoders, and a UNet with size conditioning."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler
from torch import Tensor, nn

from hypergen.conditioning import controlnet
from hypergen.conditioning.inpaint import InpaintModel
from hypergen.conditioning.latent_space import LatentSpace
from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.schedulers import SchedulerFactory
from hypergen.lora.batched_lora import Loras
from hypergen.lora.textual_inversion import load_embeddings
from hypergen.model_families import FAMILIES
from hypergen.model_info import ModelInfo
from hypergen.models import unet_inputs
from hypergen.models.family import Family, PromptEmbeds
from hypergen.models.refiner import Experts, Refiner
from hypergen.models.resolution import round_up
from hypergen.models.text_encoders.clip import ClipEncoder, concat_embeds, max_length
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache
from hypergen.request import GenerationRequest

# Turbo is distilled to a few steps without guidance.
_TURBO_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0, "width": 1024, "height": 1024}


class StableDiffusionXL(Family):
    """Stable Diffusion XL with step-level batching."""

    spec = FAMILIES["sdxl"]
    half_dtype = torch.float16

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        super().__init__(pipeline, model_card, settings)
        self.space = LatentSpace(self.vae, self.denoiser.dtype, upcast=self.vae.config.force_upcast)
        self.schedulers = SchedulerFactory(pipeline.scheduler)
        self.force_zeros_for_empty_prompt: bool = pipeline.config.force_zeros_for_empty_prompt
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)  # it overflows in float16

        embeddings = load_embeddings(pipeline, settings)

        def cached(tokenizer: Any, component: str) -> PromptCache:
            encode = ClipEncoder(
                tokenizer,
                getattr(pipeline, component),
                settings,
                self.denoiser.dtype,
                penultimate=True,
                embeddings=embeddings,
                component=component,
            )
            return PromptCache(encode, settings.prompt_cache_mb * 1_000_000 // 2, self.lora_manager)

        with torch.inference_mode():
            self.encoders = (
                cached(pipeline.tokenizer, "text_encoder"),
                cached(pipeline.tokenizer_2, "text_encoder_2"),
            )
        self.clip_encoders = self.encoders
        self.refiner = None
        if settings.refiner:
            self.refiner = Refiner(Path(settings.refiner), self.denoiser, settings, embeddings)
        self.prompt_caches = self.encoders
        if self.refiner is not None:
            self.prompt_caches = (*self.encoders, self.refiner.prompts)
            self.denoiser = Experts(self.denoiser, self.refiner.unet)

    @classmethod
    def find_inpaint_model(cls, denoiser: Any, vae: Any) -> InpaintModel | None:
        return unet_inputs.find_inpaint_model(denoiser, vae)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return *super().modules, *(self.refiner.modules if self.refiner else ())

    @property
    def defaults(self) -> dict[str, Any]:
        return _TURBO_DEFAULTS if _is_turbo(self.schedulers.published) else super().defaults

    def model_info(self, model_id: str) -> ModelInfo:
        info = super().model_info(model_id)
        return replace(info, capabilities=info.capabilities | {"enable_refiner"}) if self.refiner else info

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        return round_up(width, self.vae_scale_factor), round_up(height, self.vae_scale_factor)

    def encode_prompts(self, request: GenerationRequest, loras: Loras = ()) -> PromptEmbeds:
        refiner = None
        if self.refiner is not None and request.enable_refiner:
            refiner = self.refiner.encode_prompts(request, loras)
        clip_skip = request.clip_skip
        positive = self._encode(request.prompt, request.prompt_2, loras, clip_skip)
        tokens = positive[0].tokens
        if request.guidance_scale <= 1:
            inputs = self._build_inputs(positive, max_length(positive), clip_skip)
            return PromptEmbeds(inputs, None, tokens, refiner)
        negative = self._encode(request.negative_prompt or "", request.negative_prompt_2, loras, clip_skip)
        length = max_length([*positive, *negative])
        negative_inputs = self._build_inputs(negative, length, clip_skip)
        if self.force_zeros_for_empty_prompt and not (request.negative_prompt or request.negative_prompt_2):
            negative_inputs = negative_inputs.map(torch.zeros_like)
        return PromptEmbeds(self._build_inputs(positive, length, clip_skip), negative_inputs, tokens, refiner)

    def prepare(
        self, request: GenerationRequest, index: int, prompts: PromptEmbeds, loras: Loras = ()
    ) -> DenoisingState:
        width, height = self.generation_size(request.width, request.height)
        # Original size, crop and target size, as (height, width): not a crop of a larger image.
        time_ids = torch.tensor(
            [[height, width, 0, 0, height, width]], dtype=self.denoiser.dtype, device=self.device
        )
        state = self._prepare(request, index, prompts, loras, time_ids=time_ids)
        if self.refiner is not None and prompts.refiner is not None:
            state.next_denoiser = self.refiner.switch(state, prompts.refiner, width, height, self.schedulers)
        return state

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        added = {"text_embeds": inputs.pooled_prompt_embeds, "time_ids": inputs.time_ids}
        residuals: dict[str, Any] = {}
        if (network := controlnet.controlnet_from_key(batch_key_extra, self.controlnets)) is not None:
            residuals = controlnet.residuals(network, latents, timesteps, inputs, added_cond_kwargs=added)
        return self.denoiser(
            unet_inputs.with_mask(latents, inputs),
            timesteps,
            encoder_hidden_states=inputs.encoder_hidden_states,
            added_cond_kwargs=added,
            return_dict=False,
            **residuals,
        )[0]

    def _encode(
        self, text: str, text_2: str | None, loras: Loras, clip_skip: int | None
    ) -> tuple[EncodedPrompt, EncodedPrompt]:
        first, second = self.encoders
        return first.get(text, loras, clip_skip), second.get(text_2 or text, loras, clip_skip)

    def _build_inputs(
        self, encoded: tuple[EncodedPrompt, EncodedPrompt], length: int, clip_skip: int | None
    ) -> ModelInputs:
        return ModelInputs(concat_embeds(self.encoders, encoded, length, clip_skip), encoded[1].pooled)


def _is_turbo(published: Any) -> bool:
    """Whether the published scheduler is SDXL Turbo's; no other file identifies Turbo."""
    trailing = published.config.get("timestep_spacing") == "trailing"
    return trailing and isinstance(published, EulerAncestralDiscreteScheduler)
