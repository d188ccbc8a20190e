"""Stable Diffusion XL, SDXL Turbo and SSD-1B: two CLIP text encoders, and a UNet with size conditioning."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionXLPipeline
from torch import Tensor, nn

from hypergen.conditioning import controlnet
from hypergen.conditioning.initial_latents import prepare_initial_latents
from hypergen.conditioning.latent_space import LatentSpace
from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.offload import device_of
from hypergen.denoising.schedulers import SAMPLERS, SchedulerFactory, takes_generator
from hypergen.lora.batched_lora import Loras
from hypergen.lora.manager import LoraManager
from hypergen.model_info import Capability, ModelDefaults, ModelInfo
from hypergen.models.family import PromptEmbeds
from hypergen.models.refiner import Experts, Refiner
from hypergen.models.resolution import round_up
from hypergen.models.text_encoders.clip import ClipEncoder, concat_embeds, max_length
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache
from hypergen.request import GenerationRequest

# Turbo is distilled to a few steps without guidance.
_TURBO_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0, "width": 1024, "height": 1024}
_CAPABILITIES: frozenset[Capability] = frozenset({"prompt_2", "negative_prompt", "image", "mask"})


class StableDiffusionXL:
    """Stable Diffusion XL with step-level batching.

    Args:
        model_card: the model's `hypergen.json`: `defaults`.
    """

    name = "sdxl"
    pipeline_class = StableDiffusionXLPipeline
    half_dtype = torch.float16

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        self.unet: Any = pipeline.unet
        self.refiner = Refiner(Path(settings.refiner), self.unet, settings) if settings.refiner else None
        self.experts: Any = Experts(self.unet, self.refiner.unet) if self.refiner else self.unet
        self.vae: Any = pipeline.vae
        self.model_card = model_card
        self.lora_manager = LoraManager(pipeline, settings)
        self.space = LatentSpace(self.vae, self.unet.dtype, upcast=self.vae.config.force_upcast)
        self.controlnets: Mapping[str, nn.Module] = {}  # set by `load_any`
        self.schedulers = SchedulerFactory(pipeline.scheduler, device_of(self.unet))
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.force_zeros_for_empty_prompt: bool = pipeline.config.force_zeros_for_empty_prompt
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            self.vae.to(torch.float32)  # it overflows in float16

        def cached(tokenizer: Any, text_encoder: Any) -> PromptCache:
            encode = ClipEncoder(tokenizer, text_encoder, settings, self.unet.dtype, penultimate=True)
            return PromptCache(encode, settings.prompt_cache_mb * 1_000_000 // 2, self.lora_manager)

        with torch.inference_mode():
            self.encoders = (
                cached(pipeline.tokenizer, pipeline.text_encoder),
                cached(pipeline.tokenizer_2, pipeline.text_encoder_2),
            )

    @property
    def denoiser(self) -> nn.Module:
        return self.experts

    @property
    def device(self) -> torch.device:
        return device_of(self.unet)

    @property
    def decoder(self) -> nn.Module:
        return self.vae

    def model_info(self, model_id: str) -> ModelInfo:
        side = self.unet.config.sample_size * self.vae_scale_factor
        defaults = {"num_inference_steps": 50, "guidance_scale": 7.5, "width": side, "height": side}
        capabilities: set[Capability] = {*_CAPABILITIES, *self.lora_manager.capabilities}
        if self.refiner:
            capabilities.add("enable_refiner")
        if self.controlnets:
            capabilities.add("control")
        own_defaults = _TURBO_DEFAULTS if _is_turbo(self.schedulers.published) else {}
        return ModelInfo(
            id=model_id,
            family=self.name,
            defaults=ModelDefaults(**{**defaults, **own_defaults, **self.model_card.get("defaults", {})}),
            samplers={name: sampler.min_steps for name, sampler in SAMPLERS.items()},
            min_steps=self.schedulers.min_steps,
            device=self.device.type,
            dtype=str(self.unet.dtype).removeprefix("torch."),
            capabilities=frozenset(capabilities),
            controlnets=tuple(self.controlnets),
            **self.lora_manager.info_fields(),
        )

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        return round_up(width, self.vae_scale_factor), round_up(height, self.vae_scale_factor)

    def load_loras(self, request: GenerationRequest) -> Future[Loras] | None:
        return self.lora_manager.load_in_background(request.loras)

    def encode_prompts(self, request: GenerationRequest, loras: Loras = ()) -> PromptEmbeds:
        refiner = self.refiner.encode_prompts(request) if self.refiner and request.enable_refiner else None
        positive = self._encode(request.prompt, request.prompt_2, loras)
        tokens = positive[0].tokens
        if request.guidance_scale <= 1:
            return PromptEmbeds(self._build_inputs(positive, max_length(positive)), None, tokens, refiner)
        negative = self._encode(request.negative_prompt or "", request.negative_prompt_2, loras)
        length = max_length([*positive, *negative])
        negative_inputs = self._build_inputs(negative, length)
        if self.force_zeros_for_empty_prompt and not (request.negative_prompt or request.negative_prompt_2):
            negative_inputs = negative_inputs.map(torch.zeros_like)
        return PromptEmbeds(self._build_inputs(positive, length), negative_inputs, tokens, refiner)

    def prepare(
        self, request: GenerationRequest, index: int, prompts: PromptEmbeds, loras: Loras = ()
    ) -> DenoisingState:
        width, height = size = self.generation_size(request.width, request.height)
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        scheduler = self.schedulers.make(request.sampler, request.num_inference_steps)
        initial = prepare_initial_latents(request, scheduler, self.space, size, generator)
        controlnet_inputs = controlnet.prepare_controlnet(
            request.control, self.controlnets, size, scheduler, initial.step_index
        )
        # Original size, crop and target size, as (height, width): not a crop of a larger image.
        time_ids = torch.tensor(
            [[height, width, 0, 0, height, width]], dtype=self.unet.dtype, device=self.device
        )
        image_inputs = {"time_ids": time_ids, "controlnet_cond": controlnet_inputs.controlnet_cond}
        state = DenoisingState(
            request=request,
            index=index,
            latents=initial.latents,
            step_index=initial.step_index,
            after_step=initial.after_step,
            skip_denoising=initial.skip_denoising,
            batch_key_extra=controlnet_inputs.batch_key_extra,
            controlnet_scales=controlnet_inputs.controlnet_scales,
            positive=replace(prompts.positive, **image_inputs),
            negative=None if prompts.negative is None else replace(prompts.negative, **image_inputs),
            guidance_scale=request.guidance_scale,
            prompt_tokens=prompts.tokens,
            generator=generator,
            scheduler=scheduler,
            is_stochastic=takes_generator(scheduler),
            loras=loras,
        )
        if self.refiner is not None and prompts.refiner is not None:
            state.next_denoiser = self.refiner.switch(state, prompts.refiner, width, height, self.schedulers)
        return state

    def decode(self, state: DenoisingState) -> Tensor:
        latents = state.latents.to(self.vae.dtype) / self.vae.config.scaling_factor
        return self.vae.decode(latents, return_dict=False)[0]

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
        return self.experts(
            latents,
            timesteps,
            encoder_hidden_states=inputs.encoder_hidden_states,
            added_cond_kwargs=added,
            return_dict=False,
            **residuals,
        )[0]

    def _encode(self, text: str, text_2: str | None, loras: Loras) -> tuple[EncodedPrompt, EncodedPrompt]:
        first, second = self.encoders
        return first.get(text, loras), second.get(text_2 or text, loras)

    def _build_inputs(self, encoded: tuple[EncodedPrompt, EncodedPrompt], length: int) -> ModelInputs:
        return ModelInputs(concat_embeds(self.encoders, encoded, length), encoded[1].pooled)


def _is_turbo(published: Any) -> bool:
    """Whether the published scheduler is SDXL Turbo's; no other file identifies Turbo."""
    trailing = published.config.get("timestep_spacing") == "trailing"
    return trailing and isinstance(published, EulerAncestralDiscreteScheduler)
