"""Account for the tensors of a folder in diffusers' layout, which `from_pretrained` does not: it warns."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn

from hypergen.errors import ModelError
from hypergen.model_store.checkpoint_detection import METADATA
from hypergen.model_store.diffusers_layout import safetensors_header
from hypergen.models.checkpoint_conversion import with_text_model, with_tied_weights
from hypergen.models.networks import component_classes, empty_network
from hypergen.models.tensor_accounting import Account, take_account, traced

_CLIP = {
    r"vision_model\..+|visual_projection\.weight": "CLIP's image encoder",
    r"text_projection\.weight": "has no use here",
}
# Networks of transformers whose names are known -> tensors that they do not need, see `take_account`. The
# others are left to transformers.
_TEXT_ENCODERS: dict[str, dict[str, str]] = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": {r"decoder\..+|lm_head\.weight": "T5's decoder"},
}


def account_for_folder(path: Path, skipped: Mapping[str, Any]) -> Account:
    """What the networks of a model folder use of their files; reads no weights.

    Args:
        skipped: components that are not loaded.
    """
    total = Account()
    for name, component_class in component_classes(path):
        if name in skipped or not any((path / name).glob("*.safetensors")):
            continue
        account = account_for_component(path / name, component_class, name)
        total.used |= {f"{name}/{tensor}" for tensor in account.used}
        total.ignored |= {f"{name}/{tensor}": reason for tensor, reason in account.ignored.items()}
        total.fault = total.fault or account.fault
    return total


def account_for_component(folder: Path, component_class: Any, component: str) -> Account:
    """What a network uses of the files in its folder."""
    if not _is_known(component_class, folder):
        return Account()
    header: dict[str, Any] = {}
    for file in sorted(folder.glob("*.safetensors")):
        header |= json.loads(safetensors_header(file, component, file.name))
    header.pop(METADATA, None)
    network = empty_network(folder, component_class)
    try:
        converted = _by_name(network, traced(header, header))
    except ModelError as error:
        return Account(fault=f"{component}: {error}")
    harmless = _TEXT_ENCODERS.get(component_class.__name__)
    account = take_account(header, {component: (network, converted)}, harmless=harmless)
    if account.fault:
        account.fault = f"The folder's {component} does not match its configuration: {account.fault}"
    return account


def _is_known(component_class: Any, folder: Path) -> bool:
    is_network = issubclass(component_class, ModelMixin) or component_class.__name__ in _TEXT_ENCODERS
    return is_network and "quantization_config" not in json.loads((folder / "config.json").read_bytes())


def _by_name(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of the installed versions of diffusers and transformers."""
    if isinstance(network, ModelMixin):
        network._fix_state_dict_keys_on_load(tensors)  # pyright: ignore[reportArgumentType]  any dict works
        return tensors
    if type(network).__name__.startswith("CLIP"):
        tensors = with_text_model(network, tensors)
    return with_tied_weights(network, tensors)
