"""Classifier-free guidance: one forward pass over the rows of a batch, then one prediction per image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.lora.manager import lora_context
from hypergen.models.family import Family

# Arguments of `Family.forward`: latents, timesteps and model inputs of the rows of a batch.
ForwardInputs = tuple[Tensor, Tensor, ModelInputs]


def denoise(family: Family, states: Sequence[DenoisingState], row_count: int = 0) -> list[Tensor]:
    """Run one forward pass; returns one guided prediction of shape (1, C, h, w) per state.

    Args:
        states: of one batch key, and so of one `batch_key_extra`.
        row_count: pad the batch to this many rows with copies of its last row.
    """
    guided = [state for state in states if state.guided]
    latents = {state: state.model_input() for state in states}
    # Negative rows first, as diffusers orders them.
    inputs = [s.inputs_at(s.step_index, s.negative) for s in guided if s.negative is not None]
    inputs += [s.inputs_at(s.step_index, s.positive) for s in states]
    rows = [*guided, *states]
    padding = max(0, row_count - len(rows))
    rows += rows[-1:] * padding
    inputs += inputs[-1:] * padding
    with lora_context(family.lora_manager, [s.loras for s in rows]):
        noise_pred = family.forward(
            torch.cat([latents[s] for s in rows]),
            torch.stack([s.timestep.to(torch.float32) for s in rows]),
            ModelInputs.stack(inputs),
            batch_key_extra=states[0].batch_key_extra,
        ).split(1)
    predictions = dict(zip(states, noise_pred[len(guided) :], strict=False))
    for state, negative in zip(guided, noise_pred, strict=False):
        # Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, with guidance_scale = w + 1.
        difference = predictions[state] - negative
        predictions[state] = negative + state.guidance_scale * difference
    return list(predictions.values())


def random_rows(state: DenoisingState, rows: int, generator: torch.Generator) -> ForwardInputs:
    """Random arguments of `Family.forward` in the shapes and dtypes of an image, different in each row."""
    latents = state.latents

    def noise(like: Tensor) -> Tensor:
        return torch.randn((rows, *like.shape[1:]), generator=generator).to(like)

    def vary(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():  # a mask of tokens
            return tensor.expand(rows, *tensor.shape[1:])
        return tensor + noise(tensor)

    return (
        noise(latents),
        torch.randint(0, 1000, (rows,), generator=generator).to(latents.device, torch.float32),
        state.inputs_at(0, state.positive).map(vary),
    )


def map_rows(inputs: ForwardInputs, change: Callable[[Tensor], Tensor]) -> ForwardInputs:
    """Apply a function to each tensor of the arguments of `Family.forward`."""
    latents, timesteps, model_inputs = inputs
    return change(latents), change(timesteps), model_inputs.map(change)
