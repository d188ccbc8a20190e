"""Check the folder of one network, without reading its weights, as `check_model` checks a model:
`python -m hypergen.models.check_network CLASS FOLDER [MODEL]`.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker

from hypergen.conditioning.controlnet import difference_to_unet
from hypergen.errors import ModelError
from hypergen.model_store.model_check import Report
from hypergen.models.folder_accounting import account_for_component
from hypergen.models.model_options import check_vae_channels
from hypergen.models.networks import DAMAGED, empty_network, one_line

_CLASSES: dict[str, Any] = {
    network.__name__: network for network in (AutoencoderKL, ControlNetModel, StableDiffusionSafetyChecker)
}


def check_network(class_name: str, folder: Path, model: Path | None) -> Report:
    """What loading the network would refuse.

    Args:
        model: the folder of the model that it is for.
    """
    network_class = _CLASSES[class_name]
    try:
        account = account_for_component(folder, network_class, class_name)
        return Report(account.fault or _difference(network_class, folder, model), account.ignored)
    except ModelError as error:
        return Report(str(error), {})
    except DAMAGED as error:
        return Report(one_line(error), {})


def _difference(network_class: Any, folder: Path, model: Path | None) -> str | None:
    """How the network differs from what the model needs."""
    if model is None:
        return None
    if network_class is AutoencoderKL:
        check_vae_channels(folder, model)
    if network_class is ControlNetModel:
        if not (model / "unet").is_dir():
            return "ControlNets are only supported for models with a UNet."
        unet: Any = empty_network(model / "unet", UNet2DConditionModel)
        network: Any = empty_network(folder, network_class)
        return difference_to_unet(network.config, unet.config)
    return None


if __name__ == "__main__":
    class_name, folder, *model = sys.argv[1:]
    found = check_network(class_name, Path(folder), Path(model[0]) if model else None)
    print(json.dumps(asdict(found)))
