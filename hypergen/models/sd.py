"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet that predicts noise or velocity."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
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
from hypergen.models.resolution import choose_generation_size
from hypergen.models.text_encoders.clip import ClipEncoder, max_length
from hypergen.models.text_encoders.prompt_cache import PromptCache, pad_with_empty_chunks
from hypergen.request import GenerationRequest


class StableDiffusion:
    """Stable Diffusion with step-level batching.

    Args:
        model_card: the model's `hypergen.json`: `defaults`, and in pixels `max_native_area` and
            `min_native_side`, see `choose_generation_size`.
    """

    name = "sd"
    pipeline_class = StableDiffusionPipeline
    half_dtype = torch.float16

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        self.unet: Any = pipeline.unet
        self.vae: Any = pipeline.vae
        self.text_encoder: Any = pipeline.text_encoder
        self.tokenizer: Any = pipeline.tokenizer
        self.model_card = model_card
        self.lora_manager = LoraManager(pipeline, settings)
        self.schedulers = SchedulerFactory(pipeline.scheduler, device_of(self.unet))
        self.space = LatentSpace(self.vae, self.unet.dtype)
        self.controlnets: Mapping[str, nn.Module] = {}  # set by `load_any`
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        with torch.inference_mode():
            encode = ClipEncoder(
                self.tokenizer,
                self.text_encoder,
                settings,
                self.unet.dtype,
                penultimate=False,
            )
            self.prompts = PromptCache(encode, settings.prompt_cache_mb * 1_000_000, self.lora_manager)

    @property
    def is_inpaint_model(self) -> bool:
        """Whether the UNet was trained for inpainting, and takes mask and kept region as more channels."""
        return self.unet.config.in_channels > self.vae.config.latent_channels

    @property
    def denoiser(self) -> nn.Module:
        return self.unet

    @property
    def device(self) -> torch.device:
        return device_of(self.unet)

    @property
    def decoder(self) -> nn.Module:
        return self.vae

    def model_info(self, model_id: str) -> ModelInfo:
        side = self.unet.config.sample_size * self.vae_scale_factor
        defaults = {"num_inference_steps": 50, "guidance_scale": 7.5, "width": side, "height": side}
        capabilities: set[Capability] = {"negative_prompt", "image", "mask"}
        if self.controlnets:
            capabilities.add("control")
        return ModelInfo(
            id=model_id,
            family=self.name,
            defaults=ModelDefaults(**{**defaults, **self.model_card.get("defaults", {})}),
            samplers={name: sampler.min_steps for name, sampler in SAMPLERS.items()},
            min_steps=self.schedulers.min_steps,
            device=self.device.type,
            dtype=str(self.unet.dtype).removeprefix("torch."),
            capabilities=frozenset[Capability]({*capabilities, *self.lora_manager.capabilities}),
            controlnets=tuple(self.controlnets),
            **self.lora_manager.info_fields(),
        )

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        native = self.model_card.get("max_native_area"), self.model_card.get("min_native_side")
        return choose_generation_size(width, height, self.vae_scale_factor, *native)

    def load_loras(self, request: GenerationRequest) -> Future[Loras] | None:
        return self.lora_manager.load_in_background(request.loras)

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
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        scheduler = self.schedulers.make(request.sampler, request.num_inference_steps)
        size = self.generation_size(request.width, request.height)
        initial = prepare_initial_latents(
            request, scheduler, self.space, size, generator, is_inpaint_model=self.is_inpaint_model
        )
        controlnet_inputs = controlnet.prepare_controlnet(
            request.control, self.controlnets, size, scheduler, initial.step_index
        )
        image_inputs = {
            "mask": initial.mask,
            "masked_image_latents": initial.masked_image_latents,
            "controlnet_cond": controlnet_inputs.controlnet_cond,
        }
        return DenoisingState(
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
        residuals: dict[str, Any] = {}
        if (network := controlnet.controlnet_from_key(batch_key_extra, self.controlnets)) is not None:
            residuals = controlnet.residuals(network, latents, timesteps, inputs)
        if inputs.mask is not None and inputs.masked_image_latents is not None:
            latents = torch.cat([latents, inputs.mask, inputs.masked_image_latents], dim=1)
        return self.unet(
            latents,
            timesteps,
            encoder_hidden_states=inputs.encoder_hidden_states,
            return_dict=False,
            **residuals,
        )[0]
