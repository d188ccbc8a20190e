"""The interface between the engine and a model family."""

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


class Family(Protocol):
    """A loaded model, split into the steps that the engine schedules."""

    # Name in requests -> network.
    controlnets: Mapping[str, nn.Module]

    @property
    def lora_manager(self) -> LoraManager | None:
        """None: the family does not support LoRA."""
        ...

    @property
    def denoiser(self) -> nn.Module:
        """The UNet or transformer, which runs in every step."""
        ...

    @property
    def device(self) -> torch.device: ...

    @property
    def decoder(self) -> nn.Module:
        """The VAE, which turns latents into pixels."""
        ...

    def model_info(self, model_id: str) -> ModelInfo:
        """Defaults and capabilities, against which requests are validated."""
        ...

    def generation_size(self, width: int, height: int) -> tuple[int, int]:
        """The size (width, height) in pixels at which the model generates an image of the requested size.

        The decoded image is cropped or resized to the requested size.
        """
        ...

    def load_loras(self, request: GenerationRequest) -> Future[Loras] | None:
        """Start loading the LoRAs of a request in the background; None: it has none.

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
        """Decode the latents of one image: -1..1, shape (1, 3, height, width) at the generation size."""
        ...

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
        ...
