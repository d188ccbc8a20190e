"""FLUX.1 schnell and dev: a transformer over 2x2 patches, T5 token embeddings and a pooled CLIP embedding."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from typing import Any

import torch
from diffusers import FluxPipeline
from torch import Tensor, nn
from torch.nn import functional

from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.offload import device_of
from hypergen.denoising.schedulers import FLOW_SAMPLERS, FlowSchedulerFactory, takes_generator
from hypergen.lora.batched_lora import Loras
from hypergen.lora.manager import LoraManager
from hypergen.model_info import Capability, ModelDefaults, ModelInfo
from hypergen.models.family import PromptEmbeds
from hypergen.models.resolution import round_up
from hypergen.models.text_encoders.clip import PooledClipEncoder
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache
from hypergen.models.text_encoders.t5 import T5Encoder
from hypergen.request import GenerationRequest

_PATCH = 2  # side of a patch in latent pixels
_SIDE = 1024
_DEV_DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 3.5, "width": _SIDE, "height": _SIDE}
# Distilled to a few steps, without guidance.
_SCHNELL_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0, "width": _SIDE, "height": _SIDE}
# Tokens of T5, as in training.
_DEV_LENGTH, _SCHNELL_LENGTH = 512, 256


class Flux:
    """FLUX.1 with step-level batching.

    `guidance_scale` is the distilled guidance of FLUX.1 dev, an input of the transformer. A negative prompt
    needs classifier-free guidance, with two rows per image; its scale is `true_cfg_scale`.

    Latents stay (1, C, h, w); `forward` packs them into patches.

    Args:
        model_card: the model's `hypergen.json`: `defaults`, and the default `true_cfg_scale` (4 if absent).
    """

    name = "flux"
    pipeline_class = FluxPipeline
    half_dtype = torch.bfloat16

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        self.transformer: Any = pipeline.transformer
        self.vae: Any = pipeline.vae
        self.model_card = model_card
        self.lora_manager = LoraManager(pipeline, settings)
        self.controlnets: Mapping[str, nn.Module] = {}
        self.true_cfg_scale: float = model_card.get("true_cfg_scale", 4.0)
        self.schedulers = FlowSchedulerFactory(
            pipeline.scheduler, device_of(self.transformer), sigmas_end_at_last_step=True
        )
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.takes_guidance: bool = self.transformer.config.guidance_embeds
        length = _DEV_LENGTH if self.takes_guidance else _SCHNELL_LENGTH
        dtype, cache_bytes = self.transformer.dtype, settings.prompt_cache_mb * 1_000_000 // 2
        with torch.inference_mode():
            self.clip = PromptCache(
                PooledClipEncoder(pipeline.tokenizer, pipeline.text_encoder, dtype=dtype),
                cache_bytes,
                self.lora_manager,
            )
            self.t5 = PromptCache(
                T5Encoder(pipeline.tokenizer_2, pipeline.text_encoder_2, length, dtype),
                cache_bytes,
                self.lora_manager,
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
        defaults = _DEV_DEFAULTS if self.takes_guidance else _SCHNELL_DEFAULTS
        return ModelInfo(
            id=model_id,
            family=self.name,
            defaults=ModelDefaults(**{**defaults, **self.model_card.get("defaults", {})}),
            samplers={name: sampler.min_steps for name, sampler in FLOW_SAMPLERS.items()},
            min_steps=self.schedulers.min_steps,
            device=self.device.type,
            dtype=str(self.transformer.dtype).removeprefix("torch."),
            capabilities=frozenset[Capability](
                {"prompt_2", "negative_prompt", "true_cfg_scale", *self.lora_manager.capabilities}
            ),
            **self.lora_manager.info_fields(),
        )

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        multiple = self.vae_scale_factor * _PATCH
        return round_up(width, multiple), round_up(height, multiple)

    def load_loras(self, request: GenerationRequest) -> Future[Loras] | None:
        return self.lora_manager.load_in_background(request.loras)

    def encode_prompts(self, request: GenerationRequest, loras: Loras = ()) -> PromptEmbeds:
        texts = [(request.prompt, request.prompt_2)]
        if (request.negative_prompt or request.negative_prompt_2) and self._cfg_scale(request) > 1:
            texts.append((request.negative_prompt or "", request.negative_prompt_2))
        encoded = [(self.t5.get(text_2 or text, loras), self.clip.get(text, loras)) for text, text_2 in texts]
        positive, *negatives = [self._build_inputs(request, *prompts) for prompts in encoded]
        return PromptEmbeds(positive, negatives[0] if negatives else None, encoded[0][0].tokens)

    def prepare(
        self, request: GenerationRequest, index: int, prompts: PromptEmbeds, loras: Loras = ()
    ) -> DenoisingState:
        width, height = self.generation_size(request.width, request.height)
        rows, columns = height // self.vae_scale_factor, width // self.vae_scale_factor
        scheduler = self.schedulers.make(
            request.sampler, request.num_inference_steps, rows * columns // _PATCH**2
        )
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        shape = (1, self.transformer.config.in_channels // _PATCH**2, rows, columns)
        noise = torch.randn(shape, generator=generator, dtype=self.transformer.dtype)
        return DenoisingState(
            request=request,
            index=index,
            latents=noise.to(self.device),
            positive=prompts.positive,
            negative=prompts.negative,
            guidance_scale=self._cfg_scale(request),
            prompt_tokens=prompts.tokens,
            generator=generator,
            scheduler=scheduler,
            is_stochastic=takes_generator(scheduler),
            loras=loras,
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
        prompt_embeds = inputs.encoder_hidden_states
        height, width = (side // _PATCH for side in latents.shape[-2:])
        packed = functional.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)
        output = self.transformer(
            hidden_states=packed,
            # Cast before the division, as in diffusers.
            timestep=timesteps.to(latents.dtype) / 1000,
            guidance=inputs.guidance,
            pooled_projections=inputs.pooled_prompt_embeds,
            encoder_hidden_states=prompt_embeds,
            txt_ids=prompt_embeds.new_zeros(prompt_embeds.shape[1], 3),
            img_ids=_positions(height, width, latents.device).to(latents.dtype),
            return_dict=False,
        )[0]
        return functional.pixel_shuffle(output.transpose(1, 2).unflatten(2, (height, width)), _PATCH)

    def _cfg_scale(self, request: GenerationRequest) -> float:
        """The scale of classifier-free guidance."""
        return self.true_cfg_scale if request.true_cfg_scale is None else request.true_cfg_scale

    def _build_inputs(
        self, request: GenerationRequest, t5: EncodedPrompt, clip: EncodedPrompt
    ) -> ModelInputs:
        if not self.takes_guidance:
            return ModelInputs(t5.embeds, clip.embeds)
        guidance = torch.tensor([request.guidance_scale], device=t5.embeds.device)
        return ModelInputs(t5.embeds, clip.embeds, guidance=guidance)


def _positions(height: int, width: int, device: torch.device) -> Tensor:
    """Position ids of the patches, shape (height x width, 3): zero, row, column."""
    sides = torch.arange(height, device=device), torch.arange(width, device=device)
    rows, columns = torch.meshgrid(*sides, indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
