"""Checkpoints in the original layout of Stable Diffusion 1.x, 2.x, XL and 3, which diffusers converts.

The tables map diffusers' tensor names to the original ones.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_UNET = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_VAE = {
    "conv_norm_out": "norm_out",
    "mid_block.resnets.0": "mid.block_1",
    "mid_block.resnets.1": "mid.block_2",
    "mid_block.attentions.0": "mid.attn_1",
    "conv_shortcut": "nin_shortcut",
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}
_OPEN_CLIP = {
    "text_model.encoder.layers": "transformer.resblocks",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn": "attn",
    "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.token_embedding": "token_embedding",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
}

_JOINT = {
    "pos_embed.pos_embed": "pos_embed",
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "norm1_context.linear": "adaLN_modulation.1",
    "norm1.linear": "adaLN_modulation.1",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "ff_context.": "ff.",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
    "norm_added_q": "ln_q",
    "norm_added_k": "ln_k",
    "norm_q": "ln_q",
    "norm_k": "ln_k",
    "to_out.0": "proj",
    "to_add_out": "proj",
}


def save_original(pipeline: Any, file: Path, *, second_version: bool = False) -> Path:
    """`original_tensors` in one file."""
    save_file(original_tensors(pipeline, second_version=second_version), file)
    return file


def original_tensors(pipeline: Any, *, second_version: bool = False) -> dict[str, Tensor]:
    """The UNet, the VAE and the text encoders of a pipeline.

    Args:
        second_version: the layout of Stable Diffusion 2.x, with an OpenCLIP text encoder.
    """
    tensors = _prefixed("model.diffusion_model.", _unet(pipeline.unet))
    tensors |= _prefixed("first_stage_model.", _vae(pipeline.vae))
    second = getattr(pipeline, "text_encoder_2", None)
    if pipeline.text_encoder is None:  # a refiner
        tensors |= _prefixed("conditioner.embedders.0.model.", _open_clip(second))
    elif second_version:
        tensors |= _prefixed("cond_stage_model.model.", _open_clip(pipeline.text_encoder))
    elif second is None:
        tensors |= _prefixed("cond_stage_model.", _clip(pipeline.text_encoder))
    else:
        tensors |= _prefixed("conditioner.embedders.0.", _clip(pipeline.text_encoder))
        tensors |= _prefixed("conditioner.embedders.1.model.", _open_clip(second))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _renamed(name: str, names: dict[str, str]) -> str:
    for new, old in names.items():
        name = name.replace(new, old)
    return name


def _unet(unet: Any) -> dict[str, Tensor]:
    """The original numbers blocks consecutively. A block has a resnet and its attention; downsamplers are
    separate blocks, upsamplers the last layer of a block.
    """
    layers = unet.config.layers_per_block + 1
    prefixes = dict(_UNET)
    for number in range(len(unet.down_blocks)):
        for layer in range(layers - 1):
            block = f"input_blocks.{1 + layers * number + layer}"
            prefixes[f"down_blocks.{number}.resnets.{layer}"] = f"{block}.0"
            prefixes[f"down_blocks.{number}.attentions.{layer}"] = f"{block}.1"
        prefixes[f"down_blocks.{number}.downsamplers.0.conv"] = f"input_blocks.{layers * (number + 1)}.0.op"
    for number, up in enumerate(unet.up_blocks):
        for layer in range(layers):
            prefixes[f"up_blocks.{number}.resnets.{layer}"] = f"output_blocks.{layers * number + layer}.0"
            prefixes[f"up_blocks.{number}.attentions.{layer}"] = f"output_blocks.{layers * number + layer}.1"
        last, part = layers * (number + 1) - 1, 2 if hasattr(up, "attentions") else 1
        prefixes[f"up_blocks.{number}.upsamplers.0.conv"] = f"output_blocks.{last}.{part}.conv"
    tensors: dict[str, Tensor] = {}
    for name, tensor in unet.state_dict().items():
        prefix = next(prefix for prefix in prefixes if name.startswith(f"{prefix}."))
        suffix = name.removeprefix(prefix)
        if ".resnets." in prefix:
            suffix = _renamed(suffix, _UNET_RESNET)
        tensors[prefixes[prefix] + suffix] = tensor
    return tensors


def _vae(vae: Any) -> dict[str, Tensor]:
    """The original counts the decoder's blocks from the pixels' side."""
    last = len(vae.config.up_block_types) - 1
    tensors: dict[str, Tensor] = {}
    for name, tensor in vae.state_dict().items():
        if ".attentions." in name and name.endswith(("_q.weight", "_k.weight", "_v.weight", "0.weight")):
            tensor = tensor[:, :, None, None]  # a 1x1 convolution
        old = _renamed(name, _VAE)
        for number in range(last + 1):
            old = old.replace(f"encoder.down_blocks.{number}.", f"encoder.down.{number}.")
            old = old.replace(f"decoder.up_blocks.{number}.", f"decoder.up.{last - number}.")
        old = old.replace(".resnets.", ".block.").replace("samplers.0.", "sample.")
        tensors[old] = tensor
    return tensors


def _clip(encoder: Any) -> dict[str, Tensor]:
    return _prefixed("transformer.", _full_names(encoder))


def _full_names(encoder: Any) -> dict[str, Tensor]:
    """Add the prefix "text_model.", which encoders without a projection lack in transformers."""
    return {
        name if name.startswith(("text_model.", "text_projection.")) else f"text_model.{name}": tensor
        for name, tensor in encoder.state_dict().items()
    }


def _open_clip(encoder: Any) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix, and the projection is transposed."""
    weights = _full_names(encoder)
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        old = _renamed(name, _OPEN_CLIP)
        if "q_proj" in name:
            parts = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            tensors[old.replace(".q_proj.", ".in_proj_")] = torch.cat(parts)
        elif name == "text_projection.weight":
            tensors["text_projection"] = tensor.T
        elif "k_proj" not in name and "v_proj" not in name:
            tensors[old] = tensor
    return tensors


def save_original_sd3(pipeline: Any, file: Path) -> Path:
    """`original_tensors_sd3` in one file."""
    save_file(original_tensors_sd3(pipeline), file)
    return file


def original_tensors_sd3(pipeline: Any) -> dict[str, Tensor]:
    """Stable Diffusion 3's transformer and VAE, without text encoders."""
    tensors = _prefixed("model.diffusion_model.", _joint_transformer(pipeline.transformer))
    tensors |= _prefixed("first_stage_model.", _vae(pipeline.vae))
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _joint_transformer(transformer: Any) -> dict[str, Tensor]:
    """Queries, keys and values are one matrix; the last modulations have shift and scale swapped."""
    weights: dict[str, Tensor] = transformer.state_dict()
    last = f"transformer_blocks.{len(transformer.transformer_blocks) - 1}.norm1_context."
    tensors: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if any(part in name for part in (".to_k.", ".to_v.", ".add_k_proj.", ".add_v_proj.")):
            continue
        old = name
        if name.startswith(("norm_out.", last)):
            tensor = torch.cat(tensor.chunk(2)[::-1])
        for query in ("add_q_proj", "to_q"):
            if f".{query}." in name:
                parts = [weights[name.replace(query, query.replace("q", letter))] for letter in "qkv"]
                tensor, old = torch.cat(parts), name.replace(query, "qkv")
        if name.startswith("transformer_blocks."):
            block = "context_block" if "_context." in name or "add" in name else "x_block"
            _, number, suffix = old.split(".", 2)
            old = f"joint_blocks.{number}.{block}.{suffix}"
        if name.startswith("proj_out."):
            old = f"final_layer.linear.{name.removeprefix('proj_out.')}"
        tensors[_renamed(old, _JOINT)] = tensor
    return tensors
