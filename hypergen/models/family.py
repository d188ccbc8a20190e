"""The interface between the engine and a model family, and what all families share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hypergen.conditioning import controlnet
from hypergen.conditioning.initial_latents import prepare_initial_latents
from hypergen.conditioning.inpaint import InpaintModel
from hypergen.conditioning.latent_space import LatentSpace, denormalize_latents
from hypergen.config import EngineSettings
from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.denoising.offload import device_of
from hypergen.denoising.schedulers import SchedulerFactory, takes_generator
from hypergen.lora.accelerator_batch import product_sizes
from hypergen.lora.batched_lora import Loras
from hypergen.lora.manager import LoraManager
from hypergen.model_families import FamilySpec
from hypergen.model_info import Capability, ModelDefaults, ModelInfo, Vocabulary
from hypergen.models.text_encoders.prompt_cache import PromptCache
from hypergen.request import GenerationRequest
from hypergen.served_model_config import ModelOptions


@dataclass(frozen=True)
class PromptEmbeds:
    """The encoded prompts of one request, shared by all of its images.

    Attributes:
        positive, negative: padded to the same length; `negative` is None without guidance.
        tokens: number of tokens of the prompt.
        refiner: the same prompts, encoded for SDXL's refiner.
    """

    positive: ModelInputs
    negative: ModelInputs | None
    tokens: int
    refiner: PromptEmbeds | None = None


class Family(ABC):
    """A loaded model, split into the steps that the engine schedules.

    Args:
        pipeline: of diffusers.
        model_card: the model's `hypergen.json`, such as its `defaults`.

    Attributes:
        spec: of `FAMILIES`.
        half_dtype: 16-bit dtype for accelerators.
        denoiser: the UNet or transformer, which runs in every step.
        schedulers, prompt_caches: set by the subclass.
        clip_encoders: those that `clip_skip` applies to; set by the subclass.
        inpaint_model: of denoisers that take the mask and the kept region as more channels.
        controlnets: name in requests -> network.
        lora_manager: None: the family does not support LoRA.
    """

    spec: ClassVar[FamilySpec]
    half_dtype: ClassVar[torch.dtype] = torch.bfloat16
    schedulers: SchedulerFactory
    prompt_caches: tuple[PromptCache, ...]
    clip_encoders: Sequence[PromptCache] = ()

    def __init__(self, pipeline: Any, model_card: dict[str, Any], settings: EngineSettings) -> None:
        self.denoiser: Any = pipeline.unet if hasattr(pipeline, "unet") else pipeline.transformer
        self.vae: Any = pipeline.vae
        self.vae_scale_factor = 2 ** (len(self.vae.config.block_out_channels) - 1)
        self.space = LatentSpace(self.vae, self.denoiser.dtype)
        self.inpaint_model = self.find_inpaint_model(self.denoiser, self.vae)
        self.model_card = model_card
        self.lora_manager = LoraManager(pipeline, settings) if "lora" in self.spec.settings else None
        self.controlnets: Mapping[str, nn.Module] = {}  # set by `load_any`
        self._networks = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]

    @classmethod
    def find_inpaint_model(cls, denoiser: Any, vae: Any) -> InpaintModel | None:
        """How a denoiser takes the mask, by its input channels; None: it was not trained for inpainting.

        Args:
            denoiser, vae: networks, with or without values.

        Raises:
            ModelError: it takes other inputs, such as an input image alone (InstructPix2Pix).
        """
        return None

    def set_options(self, options: ModelOptions) -> None:
        """Apply the options for requests that choose none; `check_options` has checked them."""
        self.schedulers.set_default(options.scheduler)
        if options.clip_skip is None:
            return
        with torch.inference_mode():
            for encoder in self.clip_encoders:
                encoder.set_clip_skip(options.clip_skip)

    @property
    def device(self) -> torch.device:
        return device_of(self.denoiser)

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        """All networks that are in memory."""
        return *self._networks, *self.controlnets.values()

    def free_memory(self) -> None:
        """Free encoded prompts, encoded input images and loaded LoRAs."""
        for cache in self.prompt_caches:
            cache.clear()
        self.space.clear()
        if self.lora_manager is not None:
            self.lora_manager.clear()

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values of requests, which the model card may override."""
        side = self.denoiser.config.sample_size * self.vae_scale_factor
        return {"num_inference_steps": 50, "guidance_scale": 7.5, "width": side, "height": side}

    def model_info(self, model_id: str) -> ModelInfo:
        """Defaults and capabilities, against which requests are validated."""
        capabilities: set[Capability] = {*self.spec.capabilities, *(("control",) if self.controlnets else ())}
        return ModelInfo(
            id=model_id,
            family=self.spec.name,
            defaults=ModelDefaults(**{**self.defaults, **self.model_card.get("defaults", {})}),
            samplers={name: sampler.min_steps for name, sampler in self.schedulers.samplers.items()},
            schedules={name: sampler.schedules for name, sampler in self.schedulers.samplers.items()},
            min_steps=self.schedulers.min_steps,
            device=self.device.type,
            dtype=str(self.denoiser.dtype).removeprefix("torch."),
            capabilities=frozenset(
                capabilities | (self.lora_manager.capabilities if self.lora_manager else frozenset())
            ),
            controlnets=tuple(self.controlnets),
            vocabulary=Vocabulary.of_card(self.model_card),
            **(self.lora_manager.info_fields() if self.lora_manager else {}),
        )

    @abstractmethod
    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        """The size (width, height) in pixels at which the model generates an image of the requested size.

        The decoded image is cropped or resized to the requested size.
        """

    def load_loras(self, request: GenerationRequest) -> Future[Loras] | None:
        """Start loading the LoRAs of a request in the background; None: it has none.

        Raises:
            RuntimeError: no thread can be started.
        """
        return self.lora_manager.load_in_background(request.loras) if self.lora_manager else None

    @abstractmethod
    def encode_prompts(self, request: GenerationRequest, loras: Loras = ()) -> PromptEmbeds:
        """Encode all prompts of a request, once for all of its images."""

    def prepare(
        self, request: GenerationRequest, index: int, prompts: PromptEmbeds, loras: Loras = ()
    ) -> DenoisingState:
        """Prepare the latents and the scheduler of image `index`."""
        return self._prepare(request, index, prompts, loras)

    def _prepare(
        self,
        request: GenerationRequest,
        index: int,
        prompts: PromptEmbeds,
        loras: Loras,
        *,
        image_tokens: int = 0,
        guidance_scale: float | None = None,
        **inputs: Tensor,
    ) -> DenoisingState:
        """`prepare` with the options of some families.

        Args:
            image_tokens: see `SchedulerFactory.make`.
            guidance_scale: of classifier-free guidance; None: the request's.
            inputs: more fields of `ModelInputs`, of prompt and negative prompt.
        """
        size = self.generation_size(request.width, request.height)
        generator = torch.Generator("cpu").manual_seed(request.seed + index)
        scheduler = self.schedulers.make(request.sampler, request.num_inference_steps, image_tokens)
        initial = prepare_initial_latents(
            request, scheduler, self.space, size, generator, inpaint_model=self.inpaint_model
        )
        control = controlnet.prepare_controlnet(
            request.control, self.controlnets, size, scheduler, initial.step_index
        )
        image_inputs: dict[str, Any] = {
            "mask": initial.mask,
            "masked_image_latents": initial.masked_image_latents,
            "controlnet_cond": control.controlnet_cond,
            **inputs,
        }
        return DenoisingState(
            request=request,
            index=index,
            latents=initial.latents,
            positive=replace(prompts.positive, **image_inputs),
            negative=None if prompts.negative is None else replace(prompts.negative, **image_inputs),
            guidance_scale=request.guidance_scale if guidance_scale is None else guidance_scale,
            prompt_tokens=prompts.tokens,
            generator=generator,
            scheduler=scheduler,
            is_stochastic=takes_generator(scheduler),
            loras=loras,
            lora_sizes=product_sizes(loras),
            batch_key_extra=control.batch_key_extra,
            controlnet_scales=control.controlnet_scales,
            after_step=initial.after_step,
            skip_denoising=initial.skip_denoising,
            step_index=initial.step_index,
        )

    @abstractmethod
    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        """Run the denoiser on a batch; returns its prediction, of the shape of `latents`.

        Args:
            latents: scaled by the scheduler, shape (B, C, h, w).
            timesteps: shape (B,).
            batch_key_extra: shared by all rows, see `DenoisingState.batch_key_extra`.
        """

    def decode(self, state: DenoisingState) -> Tensor:
        """Decode the latents of one image: -1..1, shape (1, 3, height, width) at the generation size."""
        latents = denormalize_latents(self.vae, state.latents.to(self.vae.dtype))
        return self.vae.decode(latents, return_dict=False)[0]
