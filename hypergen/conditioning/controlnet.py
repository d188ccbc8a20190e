"""ControlNet: networks that read a picture and steer the denoiser by adding to what its layers give.

Source: Zhang et al. 2023, https://arxiv.org/abs/2302.05543.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from hypergen.conditioning.controlnet_preprocessors import canny
from hypergen.conditioning.image_tensors import to_unit
from hypergen.denoising.denoising_state import ModelInputs
from hypergen.denoising.offload import device_of
from hypergen.errors import InvalidRequestError, ModelError
from hypergen.images.geometry import resize_to_generation_size
from hypergen.model_store.hub import split_revision
from hypergen.request import ControlInput

logger = logging.getLogger(__name__)

_KIND = "control"
# In these a control model must be like the UNet whose layers it adds to.
_SHARED_CONFIG = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")


@dataclass(frozen=True)
class ControlNetInputs:
    """What a ControlNet adds to a `DenoisingState`: fields of the same names there or in `ModelInputs`.

    Attributes:
        controlnet_cond: the control image, 0..1, shape (1, 3, H, W).
        controlnet_scales: of each step, shape (steps, 1, 1, 1); 0 outside of its window.
    """

    batch_key_extra: tuple[Hashable, ...] = ()
    controlnet_cond: Tensor | None = None
    controlnet_scales: Tensor | None = None


def load(sources: Mapping[str, str], unet: nn.Module | None, dtype: torch.dtype) -> dict[str, Any]:
    """The control models of these names, from folders or the hub, on the device of the UNet that they steer.

    Raises:
        ModelError: one cannot be loaded, or was made for another kind of model.
    """
    models: dict[str, Any] = {}
    for name, source in sources.items():
        if not isinstance(unet, UNet2DConditionModel):
            raise ModelError("Control models steer models with a UNet; this one has none.")
        try:
            where, revision = (source, None) if os.path.isdir(source) else split_revision(source)
            model: Any = ControlNetModel.from_pretrained(
                where, revision=revision, torch_dtype=dtype, use_safetensors=True
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            logger.exception("Loading the control model %s failed.", name)
            # Without the path: /health shows the reason to everybody.
            reason = " ".join(str(error).replace(source, "it").split())
            raise ModelError(f"Control model '{name}': {type(error).__name__}: {reason[:300]}") from None
        for key in _SHARED_CONFIG:
            its, ours = model.config[key], unet.config[key]
            if its != ours:
                raise ModelError(
                    f"Control model '{name}' is for another kind of model: its {key} is {its}, not {ours}."
                )
        if model.config.global_pool_conditions:
            raise ModelError(f"Control model '{name}' pools over the whole picture, which is not supported.")
        models[name] = model.to(device_of(unet)).eval()
    return models


def prepare_controlnet(
    control: ControlInput | None,
    models: Mapping[str, nn.Module],
    size: tuple[int, int],
    scheduler: Any,
    step_index: int,
) -> ControlNetInputs:
    """What a state needs to follow a control picture; nothing where there is none.

    Args:
        size: width and height in pixels that are drawn.
        step_index: where the image begins. The shares of its window are of the steps that it takes.

    Raises:
        InvalidRequestError: there is no such control model.
    """
    if control is None:
        return ControlNetInputs()
    if control.model not in models:
        has = ", ".join(models) or "none"
        raise InvalidRequestError(
            f"Unknown control model '{control.model}'; this server has {has}.", param="control_model"
        )
    pixels = resize_to_generation_size(control.image, size)
    if control.preprocessor == "canny":
        pixels = canny(pixels)
    network: Any = models[control.model]
    image = to_unit(pixels).to(network.device, network.dtype)
    steps = len(scheduler.timesteps) - step_index
    scales = [0.0] * step_index + [
        control.scale if i / steps >= control.start and (i + 1) / steps <= control.end else 0.0
        for i in range(steps)
    ]
    column = torch.tensor(scales, device=network.device).reshape(-1, 1, 1, 1)
    return ControlNetInputs(((_KIND, control.model),), image, column)


def controlnet_from_key(
    batch_key_extra: tuple[Hashable, ...], models: Mapping[str, nn.Module]
) -> nn.Module | None:
    """The control model that the rows of a pass have in common, if any."""
    names = [entry[1] for entry in batch_key_extra if isinstance(entry, tuple) and entry[0] == _KIND]
    return models[str(names[0])] if names else None


def residuals(
    model: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    inputs: ModelInputs,
    **others: Any,
) -> dict[str, Any]:
    """What a control model gives to each row of a pass, as arguments of the UNet.

    Args:
        others: what else both networks take, such as `added_cond_kwargs`.
    """
    down, mid = model(
        latents,
        timesteps,
        encoder_hidden_states=inputs.encoder_hidden_states,
        controlnet_cond=inputs.controlnet_cond,
        conditioning_scale=inputs.controlnet_scale,
        return_dict=False,
        **others,
    )
    return {
        "down_block_additional_residuals": [residual.to(latents.dtype) for residual in down],
        "mid_block_additional_residual": mid.to(latents.dtype),
    }
