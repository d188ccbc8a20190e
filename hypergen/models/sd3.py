"""Stable Diffusion 3 and 3.5: a transformer, two CLIP text encoders and optionally T5."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor, nn
from torch.nn import functional

from hypergen.conditioning.initial_latents import prepare_initial_latents
from hypergen.conditioning.latent_space import LatentSpace
from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.offload import device_of
from hypergen.denoising.schedulers import FLOW_SAMPLERS, FlowSchedulerFactory, takes_generator
from hypergen.lora.batched_lora import Loras
from hypergen.model_info import ModelDefaults, ModelInfo
from hypergen.models.family import PromptEmbeds
from hypergen.models.resolution import round_up
from hypergen.models.text_encoders.clip import ClipEncoder, concat_embeds, max_length
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache
from hypergen.models.text_encoders.prompt_weighting import without_weights
from hypergen.models.text_encoders.t5 import T5Encoder
from hypergen.request import GenerationRequest

# Tokens of T5, as in training.
_T5_LENGTH = 256


class StableDiffusion3:
    """Stable Diffusion 3 with step-level batching.

    Prompt embeddings are the two CLIP embeddings, concatenated along the features, followed by T5's tokens.
    Without `text_encoder_3` the T5 tokens are zeros, as in diffusers. `prompt_2` is only for the second CLIP
    encoder.

    Args:
        model_card: the model's `hypergen.json`: `defaults`.
    """

    name = "sd3"
    pipeline_class = StableDiffusion3Pipeline
    half_dtype = torch.bfloat16

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        self.transformer: Any = pipeline.transformer
        self.vae: Any = pipeline.vae
        self.model_card = model_card
        self.lora_manager = None
        self.controlnets: Mapping[str, nn.Module] = {}
        self.schedulers = FlowSchedulerFactory(
            pipeline.scheduler, device_of(self.transformer), sigmas_end_at_last_step=False
        )
        self.space = LatentSpace(self.vae, self.transformer.dtype)
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.patch_size: int = self.transformer.config.patch_size
        dtype = self.transformer.dtype
        cache_bytes = settings.prompt_cache_mb * 1_000_000 // 3

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

    @property
    def denoiser(self) -> nn.Module:
        return self.transformer

    @property
    def device(self) -> torch.device:
        return device_of(self.transformer)

    @property
    def decoder(self) -> nn.Module:
        return self.vae

    def model_info(self, model_id: str) -> ModelInfo:
        side = self.transformer.config.sample_size * self.vae_scale_factor
        defaults = {"num_inference_steps": 50, "guidance_scale": 7.5, "width": side, "height": side}
        return ModelInfo(
            id=model_id,
            family=self.name,
            defaults=ModelDefaults(**{**defaults, **self.model_card.get("defaults", {})}),
            samplers={name: sampler.min_steps for name, sampler in FLOW_SAMPLERS.items()},
            min_steps=self.schedulers.min_steps,
            device=self.device.type,
            dtype=str(self.transformer.dtype).removeprefix("torch."),
            capabilities=frozenset({"prompt_2", "negative_prompt", "image", "mask"}),
        )

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        multiple = self.vae_scale_factor * self.patch_size
        return round_up(width, multiple), round_up(height, multiple)

    def load_loras(self, request: GenerationRequest) -> None:
        return None

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
        patches = (side // (self.vae_scale_factor * self.patch_size) for side in size)
        scheduler = self.schedulers.make(request.sampler, request.num_inference_steps, math.prod(patches))
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        initial = prepare_initial_latents(request, scheduler, self.space, size, generator)
        return DenoisingState(
            request=request,
            index=index,
            latents=initial.latents,
            step_index=initial.step_index,
            after_step=initial.after_step,
            skip_denoising=initial.skip_denoising,
            positive=prompts.positive,
            negative=prompts.negative,
            guidance_scale=request.guidance_scale,
            prompt_tokens=prompts.tokens,
            generator=generator,
            scheduler=scheduler,
            is_stochastic=takes_generator(scheduler),
        )

    def decode(self, state: DenoisingState) -> Tensor:
        config = self.vae.config
        latents = state.latents.to(self.vae.dtype) / config.scaling_factor + config.shift_factor
        return self.vae.decode(latents, return_dict=False)[0]

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        return self.transformer(
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
        transformer = self.transformer
        shape = (1, _T5_LENGTH, transformer.config.joint_attention_dim)
        return EncodedPrompt(torch.zeros(shape, dtype=transformer.dtype, device=device_of(transformer)), 0)
