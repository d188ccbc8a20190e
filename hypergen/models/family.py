"""What the engine asks of a model family."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from torch import Tensor, nn

from hypergen.denoising.denoising_state import Trajectory
from hypergen.model_info import ModelDescription
from hypergen.models.text_encoders.prompt_cache import EncodedPrompt
from hypergen.request import GenerationRequest


class Family(Protocol):
    """A loaded model, cut at the seams between which the engine schedules."""

    # Networks that run beside the denoiser in passes of some kinds, by the name that requests use.
    control_models: Mapping[str, nn.Module]

    @property
    def denoiser(self) -> nn.Module:
        """The network that runs once per step: a UNet or a transformer."""
        ...

    @property
    def decoder(self) -> nn.Module:
        """The network that turns latents into pixels."""
        ...

    def describe(self, model_id: str) -> ModelDescription:
        """What requests are checked against."""
        ...

    def drawn_size(self, width: int, height: int) -> tuple[int, int]:
        """The size in pixels at which a picture of the asked size is drawn, before it is cropped or resized
        to it.
        """
        ...

    def prepare(self, request: GenerationRequest) -> Future[Any] | None:
        """Begin to read in a thread what `start` will need of files, which is there as long as the result is
        kept; None: nothing. May be called from any thread.
        """
        ...

    def read_prompts(self, request: GenerationRequest) -> Sequence[EncodedPrompt]:
        """Encode all that a request has to read; `start` need not encode what is still held.

        May be called beside the other methods, by one thread at a time.

        Raises:
            InvalidRequestError: a LoRA of the request cannot be used.
        """
        ...

    def start(self, request: GenerationRequest, index: int) -> Trajectory:
        """Draw the noise of image `index`, and encode the prompts that are neither held nor in the cache."""
        ...

    def denoise(self, trajectories: Sequence[Trajectory]) -> list[Tensor]:
        """One forward pass over all of them, then guidance: one prediction of shape (1, C, h, w) each."""
        ...

    def decode(self, trajectory: Trajectory) -> Tensor:
        """What the decoder makes of one denoised image: -1..1, shape (1, 3, drawn height, drawn width)."""
        ...

    def forward(self, *rows: Tensor, kind: tuple[Hashable, ...] = ()) -> Tensor:
        """The denoiser alone, over stacked rows: latents as the sampler scaled them, timesteps, then the
        tensors of their `Conditioning` and of their step.

        Args:
            kind: what the rows have in common, see `Trajectory.kind`.
        """
        ...
