"""Guidance: one forward pass over the rows of many images, then one prediction for each image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from hypergen.denoising.denoising_state import DenoisingState, ModelInputs
from hypergen.lora.manager import lora_context
from hypergen.models.family import Family

# The arguments of `Family.forward`: latents, timesteps and model inputs of the rows of one batch.
ForwardInputs = tuple[Tensor, Tensor, ModelInputs]


def denoise(family: Family, states: Sequence[DenoisingState], row_count: int = 0) -> list[Tensor]:
    """Predictions of shape (1, C, h, w), one for each state, with classifier-free guidance applied.

    Args:
        states: of one group, so of one `batch_key_extra`.
        family: its `forward` is called once.
        row_count: pad the batch to this many rows with copies of its last row.
    """
    guided = [state for state in states if state.guided]
    latents = {state: state.model_input() for state in states}
    # Negative rows first, as diffusers orders them.
    inputs = [t.inputs_at(t.step_index, t.negative) for t in guided if t.negative is not None]
    inputs += [t.inputs_at(t.step_index, t.positive) for t in states]
    rows = [*guided, *states]
    padding = max(0, row_count - len(rows))
    rows += rows[-1:] * padding
    inputs += inputs[-1:] * padding
    with lora_context(family.lora_manager, [t.loras for t in rows]):
        noise_pred = family.forward(
            torch.cat([latents[t] for t in rows]),
            torch.stack([t.timestep.to(torch.float32) for t in rows]),
            ModelInputs.stack(inputs),
            batch_key_extra=states[0].batch_key_extra,
        ).split(1)
    predictions = dict(zip(states, noise_pred[len(guided) :], strict=False))
    for state, unwanted in zip(guided, noise_pred, strict=False):
        # Ho & Salimans 2022, https://arxiv.org/abs/2207.12598, with guidance_scale = w + 1.
        towards = predictions[state] - unwanted
        predictions[state] = unwanted + state.guidance_scale * towards
    return list(predictions.values())


def random_rows(state: DenoisingState, rows: int, generator: torch.Generator) -> ForwardInputs:
    """Arguments for `Family.forward` as many images like this one would give them, each different."""
    latents = state.latents

    def noise(like: Tensor) -> Tensor:
        return torch.randn((rows, *like.shape[1:]), generator=generator).to(like)

    return (
        noise(latents),
        torch.randint(0, 1000, (rows,), generator=generator).to(latents.device, torch.float32),
        state.inputs_at(0, state.positive).map(lambda tensor: tensor + noise(tensor)),
    )


def map_rows(inputs: ForwardInputs, change: Callable[[Tensor], Tensor]) -> ForwardInputs:
    """The same arguments for `Family.forward` with each tensor changed."""
    latents, timesteps, model_inputs = inputs
    return change(latents), change(timesteps), model_inputs.map(change)
