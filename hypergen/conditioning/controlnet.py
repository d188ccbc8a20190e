"""ControlNet: a network that encodes a control image and adds residuals to the layers of the UNet.

Source: Zhang et al. 2023, https://arxiv.org/abs/2302.05543.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from torch import Tensor, nn

from hypergen.conditioning.controlnet_preprocessors import canny
from hypergen.conditioning.image_tensors import to_unit
from hypergen.denoising.denoising_state import ModelInputs
from hypergen.denoising.offload import device_of
from hypergen.errors import InvalidRequestError, SettingError
from hypergen.images.geometry import resize_to_generation_size
from hypergen.model_store.diffusers_layout import variant_of
from hypergen.request import ControlInput

logger = logging.getLogger(__name__)

_KEY = "controlnet"  # marks the entry of a ControlNet in the batch key
# A ControlNet must equal its UNet in these entries of the configuration.
_SHARED_CONFIG = ("cross_attention_dim", "block_out_channels", "layers_per_block", "addition_embed_type")


@dataclass(frozen=True)
class ControlNetInputs:
    """Fields of `DenoisingState` and `ModelInputs` for a control image.

    Attributes:
        controlnet_cond: the control image, 0..1, shape (1, 3, H, W).
        controlnet_scales: per step, shape (steps, 1, 1, 1); 0 outside the window.
    """

    batch_key_extra: tuple[Hashable, ...] = ()
    controlnet_cond: Tensor | None = None
    controlnet_scales: Tensor | None = None


def load(folders: Mapping[str, str], unet: UNet2DConditionModel, dtype: torch.dtype) -> dict[str, Any]:
    """Load ControlNets onto the device of their UNet.

    Args:
        folders: name for requests -> folder.

    Raises:
        SettingError: one cannot be loaded, or is for another UNet.
    """
    controlnets: dict[str, Any] = {}
    device = device_of(unet)
    for name, folder in folders.items():
        try:
            loaded: Any = ControlNetModel.from_pretrained(
                folder,
                torch_dtype=dtype,
                variant=variant_of(Path(folder)),
                use_safetensors=True,
                local_files_only=True,
                device_map=device if device.type == "cuda" else None,
                output_loading_info=True,
            )
        except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
            logger.exception("Loading the ControlNet %s failed.", name)
            # Without the path: /health is public.
            reason = " ".join(str(error).replace(folder, "it").split())
            reason = f"'{name}': {type(error).__name__}: {reason[:300]}"
            raise SettingError("controlnet", reason, item=name) from None
        network, info = loaded
        for key in ("missing_keys", "unexpected_keys"):  # diffusers only warns
            if names := sorted(info[key]):
                reason = f"'{name}': {key.replace('_keys', '')} tensor '{names[0]}'."
                raise SettingError("controlnet", reason, item=name)
        if difference := difference_to_unet(network.config, unet.config):
            raise SettingError("controlnet", f"'{name}': {difference}", item=name)
        controlnets[name] = network.to(device).eval()
    return controlnets


def difference_to_unet(config: Mapping[str, Any], unet_config: Mapping[str, Any]) -> str | None:
    """Why a ControlNet cannot be used with a UNet, by their configurations; None: it can."""
    for key in _SHARED_CONFIG:
        its, ours = config[key], unet_config[key]
        if its != ours:
            return f"It is for another model: its {key} is {its}, not {ours}."
    if config["global_pool_conditions"]:
        return "It has global_pool_conditions, which is not supported."
    return None


def prepare_controlnet(
    control: ControlInput | None,
    controlnets: Mapping[str, nn.Module],
    size: tuple[int, int],
    scheduler: Any,
    step_index: int,
) -> ControlNetInputs:
    """Prepare the control image of a request; empty without one.

    Args:
        size: generation size (width, height) in pixels.
        step_index: the first step to run; `start` and `end` of the window are shares of the steps from here.

    Raises:
        InvalidRequestError: unknown ControlNet.
    """
    if control is None:
        return ControlNetInputs()
    if control.model not in controlnets:
        known = ", ".join(controlnets) or "none"
        raise InvalidRequestError(
            f"Unknown ControlNet '{control.model}'; this server has {known}.", param="control_model"
        )
    pixels = resize_to_generation_size(control.image, size)
    if control.preprocessor == "canny":
        pixels = canny(pixels)
    network: Any = controlnets[control.model]
    image = to_unit(pixels).to(network.device, network.dtype)
    steps = len(scheduler.timesteps) - step_index
    scales = [0.0] * step_index + [
        control.scale if i / steps >= control.start and (i + 1) / steps <= control.end else 0.0
        for i in range(steps)
    ]
    scales_tensor = torch.tensor(scales, device=network.device).reshape(-1, 1, 1, 1)
    return ControlNetInputs(((_KEY, control.model),), image, scales_tensor)


def controlnet_from_key(
    batch_key_extra: tuple[Hashable, ...], controlnets: Mapping[str, nn.Module]
) -> nn.Module | None:
    """The ControlNet of a batch, which all of its rows share; None: the batch has none."""
    names = [entry[1] for entry in batch_key_extra if isinstance(entry, tuple) and entry[0] == _KEY]
    return controlnets[str(names[0])] if names else None


def residuals(
    network: nn.Module,
    latents: Tensor,
    timesteps: Tensor,
    inputs: ModelInputs,
    **shared: Any,
) -> dict[str, Any]:
    """Run a ControlNet over the rows of a batch; returns its residuals as arguments of the UNet.

    Args:
        shared: arguments that ControlNet and UNet share, such as `added_cond_kwargs`.
    """
    down, mid = network(
        latents,
        timesteps,
        encoder_hidden_states=inputs.encoder_hidden_states,
        controlnet_cond=inputs.controlnet_cond,
        conditioning_scale=inputs.controlnet_scale,
        return_dict=False,
        **shared,
    )
    return {
        "down_block_additional_residuals": [residual.to(latents.dtype) for residual in down],
        "mid_block_additional_residual": mid.to(latents.dtype),
    }
