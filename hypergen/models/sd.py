"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts noise or velocity."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from hypergen.conditioning import controlnet
from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.schedulers import SchedulerFactory
from hypergen.lora.batched_lora import Loras
from hypergen.lora.textual_inversion import load_embeddings
from hypergen.model_families import FAMILIES
from hypergen.models.family import Family, PromptEmbeds
from hypergen.models.resolution import choose_generation_size
from hypergen.models.text_encoders.clip import ClipEncoder, max_length
from hypergen.models.text_encoders.prompt_cache import PromptCache, pad_with_empty_chunks
from hypergen.request import GenerationRequest


class StableDiffusion(Family):
    """Stable Diffusion with step-level batching.

    Args:
        model_card: also has, in pixels, `max_native_area` and `min_native_side`, see
            `choose_generation_size`.
    """

    spec = FAMILIES["sd"]
    half_dtype = torch.float16

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        super().__init__(pipeline, model_card, settings)
        self.schedulers = SchedulerFactory(pipeline.scheduler)
        with torch.inference_mode():
            encode = ClipEncoder(
                pipeline.tokenizer,
                pipeline.text_encoder,
                settings,
                self.denoiser.dtype,
                penultimate=False,
                embeddings=load_embeddings(pipeline, settings),
            )
            self.prompts = PromptCache(encode, settings.prompt_cache_mb * 1_000_000, self.lora_manager)

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        native = self.model_card.get("max_native_area"), self.model_card.get("min_native_side")
        return choose_generation_size(width, height, self.vae_scale_factor, *native)

    def encode_prompts(self, request: GenerationRequest, loras: Loras = ()) -> PromptEmbeds:
        prompt = self.prompts.get(request.prompt, loras)
        if request.guidance_scale <= 1:
            return PromptEmbeds(ModelInputs(prompt.embeds), None, prompt.tokens)
        negative = self.prompts.get(request.negative_prompt or "", loras)
        empty = self.prompts.get("", loras).embeds
        length = max_length([prompt, negative])
        return PromptEmbeds(
            ModelInputs(pad_with_empty_chunks(prompt.embeds, length, empty)),
            ModelInputs(pad_with_empty_chunks(negative.embeds, length, empty)),
            prompt.tokens,
        )

    def prepare(
        self, request: GenerationRequest, index: int, prompts: PromptEmbeds, loras: Loras = ()
    ) -> DenoisingState:
        # The UNet of an inpainting model takes mask and kept region as more channels.
        is_inpaint_model = self.denoiser.config.in_channels > self.vae.config.latent_channels
        return self._prepare(request, index, prompts, loras, is_inpaint_model=is_inpaint_model)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        residuals: dict[str, Any] = {}
        if (network := controlnet.controlnet_from_key(batch_key_extra, self.controlnets)) is not None:
            residuals = controlnet.residuals(network, latents, timesteps, inputs)
        if inputs.mask is not None and inputs.masked_image_latents is not None:
            latents = torch.cat([latents, inputs.mask, inputs.masked_image_latents], dim=1)
        return self.denoiser(
            latents,
            timesteps,
            encoder_hidden_states=inputs.encoder_hidden_states,
            return_dict=False,
            **residuals,
        )[0]
