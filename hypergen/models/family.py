"""What the engine asks of a model family."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.lora.batched_lora import Loras
from hypergen.lora.manager import LoraManager
from hypergen.model_info import ModelInfo
from hypergen.request import GenerationRequest


@dataclass(frozen=True)
class PromptEmbeds:
    """The encoded prompts of one request, which all of its images share.

    Attributes:
        positive, negative: padded to the same length, with the pooled embeds of models that have them; no
            negative one without guidance.
        tokens: of the prompt.
        refiner: what SDXL's refiner made of the same prompts.
    """

    positive: ModelInputs
    negative: ModelInputs | None
    tokens: int
    refiner: PromptEmbeds | None = None


class Family(Protocol):
    """A loaded model, cut at the seams between which the engine schedules."""

    # Networks that run beside the denoiser in passes of some kinds, by the name that requests use.
    controlnets: Mapping[str, nn.Module]

    @property
    def lora_manager(self) -> LoraManager | None:
        """The LoRA manager; None: the family has no LoRAs."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """The network that runs once per step: a UNet or a transformer."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def decoder(self) -> nn.Module:
        """The network that offloader latents into pixels."""
        ...

    def model_info(self, model_id: str) -> ModelInfo:
        """What requests are checked against."""
        ...

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        """The size in pixels at which a picture of the asked size is drawn, before it is cropped or resized
        to it.
        """
        ...

    def load_loras(self, request: GenerationRequest) -> Future[Loras] | None:
        """Start to load the LoRAs of a request in the background; None: it has none.

        Raises:
            RuntimeError: no thread can be started.
        """
        ...

    def encode_prompts(self, request: GenerationRequest, loras: Loras = ()) -> PromptEmbeds:
        """Encode all prompts of a request, once for all of its images."""
        ...

    def prepare(
        self, request: GenerationRequest, index: int, prompts: PromptEmbeds, loras: Loras = ()
    ) -> DenoisingState:
        """Prepare the latents and the scheduler of image `index`."""
        ...

    def decode(self, state: DenoisingState) -> Tensor:
        """What the decoder makes of one denoised image: -1..1, shape (1, 3, drawn height, drawn width)."""
        ...

    def forward(
        self,
        latents: Tensor,
        timesteps: Tensor,
        inputs: ModelInputs,
        batch_key_extra: tuple[Hashable, ...] = (),
    ) -> Tensor:
        """The denoiser alone, over the rows of a batch.

        Args:
            latents: as the sampler scaled them.
            inputs: as `ModelInputs.stack` stacks them.
            batch_key_extra: what the rows have in common, see `DenoisingState.batch_key_extra`.
        """
        ...
