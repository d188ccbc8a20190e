"""FLUX.1 schnell, dev and Fill: a transformer over 2x2 patches, T5 embeddings and a pooled CLIP embedding."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from hypergen.conditioning.inpaint import InpaintModel
from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.schedulers import FlowSchedulerFactory
from hypergen.errors import ModelError
from hypergen.lora.batched_lora import Loras
from hypergen.model_families import FAMILIES
from hypergen.model_info import ModelInfo
from hypergen.models.family import Family, PromptEmbeds
from hypergen.models.resolution import round_up
from hypergen.models.text_encoders.clip import PooledClipEncoder
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt, PromptCache
from hypergen.models.text_encoders.t5 import T5Encoder
from hypergen.request import GenerationRequest

_PATCH = 2  # side of a patch in latent pixels
_SIDE = 1024
_DEV_DEFAULTS = {"num_inference_steps": 28, "guidance_scale": 3.5, "width": _SIDE, "height": _SIDE}
_FILL_DEFAULTS = {"num_inference_steps": 50, "guidance_scale": 30.0, "width": _SIDE, "height": _SIDE}
# Distilled to a few steps, without guidance.
_SCHNELL_DEFAULTS = {"num_inference_steps": 4, "guidance_scale": 1.0, "width": _SIDE, "height": _SIDE}
# Tokens of T5, as in training.
_DEV_LENGTH, _SCHNELL_LENGTH = 512, 256


class Flux(Family):
    """FLUX.1 with step-level batching.

    `guidance_scale` is the distilled guidance of FLUX.1 dev, an input of the transformer. A negative prompt
    needs classifier-free guidance, with two rows per image; its scale is `true_cfg_scale`.

    Latents stay (1, C, h, w); `forward` packs them into patches. FLUX.1 Fill also takes the kept region and
    the pixels of the mask.

    Args:
        model_card: also has the default of `true_cfg_scale`, 4 if absent.
    """

    spec = FAMILIES["flux"]

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        super().__init__(pipeline, model_card, settings)
        self.true_cfg_scale: float = model_card.get("true_cfg_scale", 4.0)
        self.schedulers = FlowSchedulerFactory(pipeline.scheduler, sigmas_end_at_last_step=True)
        self.takes_guidance: bool = self.denoiser.config.guidance_embeds
        length = _DEV_LENGTH if self.takes_guidance else _SCHNELL_LENGTH
        dtype, cache_bytes = self.denoiser.dtype, settings.prompt_cache_mb * 1_000_000 // 2
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
        self.prompt_caches = (self.clip, self.t5)

    @classmethod
    def find_inpaint_model(cls, denoiser: Any, vae: Any) -> InpaintModel | None:
        """By the transformer's input channels, which are those of a patch."""
        latent_channels = vae.config.latent_channels
        scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        found, patch = denoiser.config.in_channels, _PATCH**2
        fill = patch * (2 * latent_channels + scale_factor**2)
        if found == patch * latent_channels:
            return None
        if found != fill:
            raise ModelError(
                f"The transformer has {found} input channels ('x_embedder.weight'); supported are "
                f"{patch * latent_channels}, and {fill} for FLUX.1 Fill."
            )
        return InpaintModel(mask_pixels_as_channels=True, samples_unused_image=True)

    @property
    def defaults(self) -> dict[str, Any]:
        if self.inpaint_model is not None:
            return _FILL_DEFAULTS
        return _DEV_DEFAULTS if self.takes_guidance else _SCHNELL_DEFAULTS

    def model_info(self, model_id: str) -> ModelInfo:
        info = super().model_info(model_id)
        if self.inpaint_model is None:
            return info
        return replace(info, capabilities=info.capabilities | {"image", "mask"})

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        multiple = self.vae_scale_factor * _PATCH
        return round_up(width, multiple), round_up(height, multiple)

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
        image_tokens = width * height // (self.vae_scale_factor * _PATCH) ** 2
        scale = self._cfg_scale(request)
        return self._prepare(request, index, prompts, loras, image_tokens=image_tokens, guidance_scale=scale)

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        prompt_embeds = inputs.encoder_hidden_states
        height, width = (side // _PATCH for side in latents.shape[-2:])
        if inputs.mask is not None and inputs.masked_image_latents is not None:
            latents = torch.cat([latents, inputs.masked_image_latents, inputs.mask], dim=1)
        packed = functional.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2)
        output = self.denoiser(
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
