"""Account for the tensors of a folder in diffusers' layout, which `from_pretrained` does not: it warns."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

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
# Networks of transformers whose names are known -> tensors that they do not need, see `take_account`. Of the
# others transformers says what it uses.
_TEXT_ENCODERS: dict[str, dict[str, str]] = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": {r"decoder\..+|lm_head\.weight": "T5's decoder"},
}
_OF_LANGUAGE_MODELS = r"(.+\.)?(lm_head\.(weight|bias)|rotary_emb\.inv_freq)"


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
    if stated := json.loads((folder / "config.json").read_bytes()).get("quantization_config"):
        method = stated.get("quant_method") if isinstance(stated, dict) else None
        return Account(
            fault=f"{component}/config.json has quantization_config ({method}), which is not read; serve the "
            "model's 16-bit weights, with --quantization if need be."
        )
    if not issubclass(component_class, ModelMixin) and component_class.__name__ not in _TEXT_ENCODERS:
        return _account_by_transformers(folder, component_class, component)
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


def _account_by_transformers(folder: Path, component_class: Any, component: str) -> Account:
    """transformers fills missing weights with random numbers, and drops others, with a line in the log."""
    if not issubclass(component_class, PreTrainedModel):
        return Account()
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        loaded: Any = component_class.from_pretrained(
            folder,
            output_loading_info=True,
            device_map="meta",
            ignore_mismatched_sizes=True,
            use_safetensors=True,
            local_files_only=True,
        )
    finally:
        transformers_logging.set_verbosity(verbosity)
    account, (_, found) = Account(), loaded
    for name in sorted(found["unexpected_keys"]):
        if re.fullmatch(_OF_LANGUAGE_MODELS, name):
            account.ignored[name] = "predicts words"
        else:
            account.fault = f"The model does not use '{name}'."
    for name, *shapes in sorted(found["mismatched_keys"]):
        account.fault = f"The tensor '{name}' has the shape {list(shapes[0])} instead of {list(shapes[1])}."
    for name in sorted(found["missing_keys"]):
        account.fault = f"The tensor '{name}' is missing."
    if account.fault:
        account.fault = f"The folder's {component} does not match its configuration: {account.fault}"
    return account


def _by_name(network: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of the installed versions of diffusers and transformers."""
    if isinstance(network, ModelMixin):
        network._fix_state_dict_keys_on_load(tensors)  # pyright: ignore[reportArgumentType]  any dict works
        return tensors
    if type(network).__name__.startswith("CLIP"):
        tensors = with_text_model(network, tensors)
    return with_tied_weights(network, tensors)
