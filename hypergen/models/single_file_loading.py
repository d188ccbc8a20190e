"""Load the networks of a single-file checkpoint; configurations come from the folder that the store made."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hypergen.errors import ModelError
from hypergen.model_families import EDM_MARKERS, optional_encoders
from hypergen.model_store.checkpoint_detection import METADATA, PREFIX, Checkpoint
from hypergen.model_store.checkpoint_file import checkpoint_header, is_edm_checkpoint, open_checkpoint
from hypergen.model_store.diffusers_layout import CHECKPOINT, PIPELINE_FILE
from hypergen.models.checkpoint_conversion import convert
from hypergen.models.networks import assign_weights, component_classes, empty_network
from hypergen.models.tensor_accounting import Account, take_account, traced

logger = logging.getLogger(__name__)


def load_networks(
    path: Path, dtype: torch.dtype, skipped: Mapping[str, Any], device: torch.device | None = None
) -> dict[str, Any]:
    """The networks of a checkpoint; None for optional text encoders that are nowhere.

    Args:
        path: a folder in diffusers' layout; its `checkpoint.safetensors` has the weights.
        skipped: components that are not loaded.
        device: where to load the weights, tensor by tensor; None: the CPU.

    Raises:
        ModelError: file and configuration do not match; names the first tensor.
    """
    checkpoint = open_checkpoint(path)
    networks = {name: n for name, n in _empty_networks(path, checkpoint).items() if name not in skipped}
    account = _take_account(path, checkpoint, networks, skipped)
    if account.fault:
        raise ModelError(_of_checkpoint(checkpoint, account.fault))
    if account.ignored:
        logger.info("The checkpoint's tensors without effect: %s.", ", ".join(account.ignored))
    with safe_open(path / CHECKPOINT, framework="pt") as file:
        for component, network in networks.items():
            tensors = {name: file.get_tensor(name) for name in checkpoint.components[component]}
            weights = convert(network, tensors, _prefix(checkpoint, component), dtype)
            assign_weights(network, weights, dtype, device)
    return {**networks, **_left_out_encoders(path, checkpoint, skipped)}


def edm_statistics(path: Path) -> dict[str, Any]:
    """The fields of the VAE's configuration that a checkpoint with EDM's markers has; else empty."""
    if not is_edm_checkpoint(path):
        return {}
    with safe_open(path / CHECKPOINT, framework="pt") as file:
        mean, std = (file.get_tensor(name).flatten().tolist() for name in EDM_MARKERS)
    # The scaling factor is that of all such models.
    return {"latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}


def account_for(path: Path) -> Account:
    """What the model in `path` uses of its checkpoint file; reads no weights."""
    checkpoint = open_checkpoint(path)
    account = _take_account(path, checkpoint, _empty_networks(path, checkpoint), {})
    if account.fault:
        account.fault = _of_checkpoint(checkpoint, account.fault)
    return account


def _of_checkpoint(checkpoint: Checkpoint, fault: str) -> str:
    return (
        f"The checkpoint ({checkpoint.family}) does not match its configuration: {fault} Serve a file of "
        "that model, or give its configuration with --single-file-config."
    )


def changed_channels(path: Path) -> dict[str, int]:
    """The input channels of a checkpoint's UNet, as a change of its configuration: those of text-to-image
    models also fit inpainting models, which have more.
    """
    checkpoint = open_checkpoint(path) if (path / CHECKPOINT).is_file() else None
    if checkpoint is None or checkpoint.layout.denoiser != "unet" or not checkpoint.in_channels:
        return {}
    return {"in_channels": checkpoint.in_channels}


def _empty_networks(path: Path, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    networks: dict[str, nn.Module] = {}
    for name, component_class in component_classes(path):
        if name in checkpoint.components:
            changes = changed_channels(path) if name == checkpoint.layout.denoiser else {}
            networks[name] = empty_network(path / name, component_class, **changes)
    return networks


def _take_account(
    path: Path, checkpoint: Checkpoint, networks: Mapping[str, nn.Module], skipped: Mapping[str, Any]
) -> Account:
    header: dict[str, Any] = json.loads(checkpoint_header(path))
    converted: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
    try:
        for component, network in networks.items():
            tensors = traced(header, checkpoint.components[component])
            converted[component] = (
                network,
                convert(network, tensors, _prefix(checkpoint, component), torch.float32),
            )
    except ModelError as error:
        return Account(fault=str(error))
    unread = {c for c, _ in component_classes(path) if c in skipped and c in checkpoint.components}
    left_out = {name for component in unread for name in checkpoint.components[component]}
    header = {name: entry for name, entry in header.items() if name != METADATA and name not in left_out}
    return take_account(header, converted, checkpoint.layout.markers)


def _prefix(checkpoint: Checkpoint, component: str) -> str:
    if component == checkpoint.layout.denoiser:
        return PREFIX
    name = checkpoint.components[component][0]
    return next(
        prefix
        for prefix, of in checkpoint.layout.components.items()
        if of == component and name.startswith(prefix)
    )


def _left_out_encoders(path: Path, checkpoint: Checkpoint, skipped: Mapping[str, Any]) -> dict[str, None]:
    index = json.loads((path / PIPELINE_FILE).read_text(encoding="utf-8"))
    left_out: dict[str, None] = {}
    for encoder, tokenizer in optional_encoders(index["_class_name"]).items():
        is_here = encoder in checkpoint.components or any((path / encoder).glob("*.safetensors"))
        if encoder in index and not is_here and encoder not in skipped:
            logger.info(
                "Neither the checkpoint nor its folder has %s: prompts are encoded without it.", encoder
            )
            left_out |= {encoder: None, tokenizer: None}
    return left_out
