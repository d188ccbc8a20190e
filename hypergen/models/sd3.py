"""Stable Diffusion 3 and 3.5: a transformer, two CLIP text encoders and optionally T5."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.schedulers import FlowSchedulerFactory
from hypergen.lora.batched_lora import Loras
from hypergen.model_families import FAMILIES
from hypergen.models.family import Family, PromptEmbeds
from hypergen.models.resolution import round_up
from hypergen.models.text_encoders.clip import ClipEncoder, concat_embeds, max_length
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache
from hypergen.models.text_encoders.prompt_weighting import without_weights
from hypergen.models.text_encoders.t5 import T5Encoder
from hypergen.request import GenerationRequest

# Tokens of T5, as in training.
_T5_LENGTH = 256


class StableDiffusion3(Family):
    """Stable Diffusion 3 with step-level batching.

    Prompt embeddings are the two CLIP embeddings, concatenated along the features, followed by T5's tokens.
    Without `text_encoder_3` the T5 tokens are zeros, as in diffusers. `prompt_2` is only for the second CLIP
    encoder.
    """

    spec = FAMILIES["sd3"]

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        super().__init__(pipeline, model_card, settings)
        self.schedulers = FlowSchedulerFactory(pipeline.scheduler, sigmas_end_at_last_step=False)
        self.size_multiple: int = self.vae_scale_factor * self.denoiser.config.patch_size
        dtype, cache_bytes = self.denoiser.dtype, settings.prompt_cache_mb * 1_000_000 // 3

        def cached(tokenizer: Any, text_encoder: Any) -> PromptCache:
            return PromptCache(
                ClipEncoder(tokenizer, text_encoder, settings, dtype, penultimate=True), cache_bytes
            )

        with torch.inference_mode():
            self.clips = (
                cached(pipeline.tokenizer, pipeline.text_encoder),
                cached(pipeline.tokenizer_2, pipeline.text_encoder_2),
            )
            encode = (
                self._zeros
                if pipeline.text_encoder_3 is None
                else T5Encoder(pipeline.tokenizer_3, pipeline.text_encoder_3, _T5_LENGTH, dtype)
            )
            self.t5 = PromptCache(
                without_weights(encode) if settings.prompt_weighting else encode, cache_bytes
            )

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        return round_up(width, self.size_multiple), round_up(height, self.size_multiple)

    def encode_prompts(self, request: GenerationRequest, loras: Loras = ()) -> PromptEmbeds:
        texts = [(request.prompt, request.prompt_2)]
        if request.guidance_scale > 1:
            texts.append((request.negative_prompt or "", request.negative_prompt_2))
        first, second = self.clips
        encoded = [(first.get(text), second.get(text_2 or text), self.t5.get(text)) for text, text_2 in texts]
        length = max_length([prompt for *clips, _ in encoded for prompt in clips])
        positive, *negatives = [self._build_inputs(*prompts, length) for prompts in encoded]
        clip, _, t5 = encoded[0]
        return PromptEmbeds(positive, negatives[0] if negatives else None, max(clip.tokens, t5.tokens))

    def prepare(
        self, request: GenerationRequest, index: int, prompts: PromptEmbeds, loras: Loras = ()
    ) -> DenoisingState:
        size = self.generation_size(request.width, request.height)
        image_tokens = math.prod(side // self.size_multiple for side in size)
        return self._prepare(request, index, prompts, loras, image_tokens=image_tokens)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        return self.denoiser(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=inputs.encoder_hidden_states,
            pooled_projections=inputs.pooled_prompt_embeds,
            return_dict=False,
        )[0]

    def _build_inputs(
        self, first: EncodedPrompt, second: EncodedPrompt, t5: EncodedPrompt, length: int
    ) -> ModelInputs:
        clip = concat_embeds(self.clips, (first, second), length)
        clip = functional.pad(clip, (0, t5.embeds.shape[-1] - clip.shape[-1]))
        pooled = [prompt.pooled for prompt in (first, second) if prompt.pooled is not None]
        return ModelInputs(torch.cat([clip, t5.embeds], dim=1), torch.cat(pooled, dim=-1))

    def _zeros(self, text: str) -> EncodedPrompt:
        shape = (1, _T5_LENGTH, self.denoiser.config.joint_attention_dim)
        return EncodedPrompt(torch.zeros(shape, dtype=self.denoiser.dtype, device=self.device), 0)
