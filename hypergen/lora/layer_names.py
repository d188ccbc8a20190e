"""Layer names of LoRA files: from every name in use for a layer to the layer of the loaded pipeline.

The pipeline's own modules are the source of truth. A name is a prefix for the network and a path, which is
that of diffusers or of the original code. `.` and `_` are the same: Kohya's layout replaces one by the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import T5EncoderModel

NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)

_DENOISER_PREFIXES = (
    "unet_",
    "transformer_",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "diffusion_model_",
    "model_diffusion_model_",
    "base_model_model_",
    "",
)
_CLIP_L_PREFIXES = ("text_encoder_", "lora_te_", "lora_te1_", "text_encoders_clip_l_transformer_")
_CLIP_G_PREFIXES = ("text_encoder_2_", "lora_te2_", "text_encoders_clip_g_transformer_")
_T5_PREFIXES = ("text_encoder_2_", "lora_te2_", "lora_te3_", "text_encoders_t5xxl_transformer_")

# Layers of the original UNet outside of its blocks, https://github.com/Stability-AI/generative-models
_UNET_LAYERS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_RESNET_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
# Names of old files for the attention layers of text encoders.
_TEXT_LAYERS = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}

# Layer of the original FLUX.1, https://github.com/black-forest-labs/flux -> diffusers' layers, whose outputs
# it concatenates. {} is a block's number.
_FLUX_LAYERS = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.{}.img_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_q",),
    "double_blocks.{}.img_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_k",),
    "double_blocks.{}.txt_attn.norm.query_norm": ("transformer_blocks.{}.attn.norm_added_q",),
    "double_blocks.{}.txt_attn.norm.key_norm": ("transformer_blocks.{}.attn.norm_added_k",),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.norm.query_norm": ("single_transformer_blocks.{}.attn.norm_q",),
    "single_blocks.{}.norm.key_norm": ("single_transformer_blocks.{}.attn.norm_k",),
    # XLabs' names of LoRAs.
    "double_blocks.{}.qkv_lora1": tuple(f"transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
    "double_blocks.{}.qkv_lora2": tuple(f"transformer_blocks.{{}}.attn.add_{part}_proj" for part in "qkv"),
    "double_blocks.{}.proj_lora1": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.proj_lora2": ("transformer_blocks.{}.attn.to_add_out",),
    "single_blocks.{}.qkv": tuple(f"single_transformer_blocks.{{}}.attn.to_{part}" for part in "qkv"),
    "single_blocks.{}.proj": ("single_transformer_blocks.{}.proj_out",),
}


@dataclass(frozen=True)
class Target:
    """A layer that (a part of) a file's layer changes.

    Attributes:
        name: with its component, such as "unet.mid_block.attentions.0.proj_in".
        rows: of the file's outputs, the layer's in their order; None: all.
    """

    name: str
    layer: nn.Module
    rows: tuple[slice, ...] | None = None


class LayerNames:
    """The layers of a pipeline by every name that LoRA files have for them."""

    def __init__(self, pipeline: Any) -> None:
        # Prefix of names -> path with `_` -> layers.
        self._networks: list[tuple[tuple[str, ...], dict[str, tuple[Target, ...]]]] = []
        if hasattr(pipeline, "unet"):
            self._add(_DENOISER_PREFIXES, "unet", pipeline.unet, _unet_paths(pipeline.unet))
        else:
            self._add(_DENOISER_PREFIXES, "transformer", pipeline.transformer, _denoiser_paths)
            self._networks[0][1].update(_flux_layers(pipeline.transformer))
        for component, prefixes in (("text_encoder", _CLIP_L_PREFIXES), ("text_encoder_2", _CLIP_G_PREFIXES)):
            encoder = getattr(pipeline, component, None)
            if encoder is not None:
                prefixes = _T5_PREFIXES if isinstance(encoder, T5EncoderModel) else prefixes
                self._add(prefixes, component, encoder, _text_paths)
                # Only encoders with a projection use one.
                self._networks[-1][1].setdefault("text_projection", ())

    def find(self, name: str) -> tuple[Target, ...] | None:
        """The layers of a file's layer; empty: the pipeline does not use that layer; None: unknown name."""
        flat = name.replace(".processor.", ".").replace(".", "_")
        for prefixes, layers in self._networks:
            for prefix in prefixes:
                if flat.startswith(prefix) and (found := layers.get(flat.removeprefix(prefix))) is not None:
                    return found
        return None

    def _add(self, prefixes: tuple[str, ...], component: str, network: nn.Module, paths: Any) -> None:
        layers: dict[str, tuple[Target, ...]] = {}
        for path, layer in network.named_modules():
            if isinstance(layer, (nn.Linear, nn.Conv2d, *NORMS)):
                target = (Target(f"{component}.{path}", layer),)
                layers.update({name.replace(".", "_"): target for name in paths(path)})
        self._networks.append((prefixes, layers))


def _denoiser_paths(path: str) -> Iterator[str]:
    yield path
    if path.endswith(".to_out.0"):  # of files before PEFT
        yield path.removesuffix(".0")


def _text_paths(path: str) -> Iterator[str]:
    parent, _, last = path.rpartition(".")
    short = path.removeprefix("text_model.")
    yield from (short, f"text_model.{short}")
    if last in _TEXT_LAYERS:
        yield f"text_model.{parent.removeprefix('text_model.')}.{_TEXT_LAYERS[last]}"


def _unet_paths(unet: Any) -> Any:
    """A function from diffusers' path of a layer to all of its paths."""
    blocks = _original_blocks(unet)

    def paths(path: str) -> Iterator[str]:
        yield from _denoiser_paths(path)
        for block, original in blocks.items():
            if path == block:
                yield original
            elif path.startswith(f"{block}."):
                inner = path.removeprefix(f"{block}.")
                inner = _RESNET_LAYERS.get(inner, inner) if ".resnets." in block else inner
                yield from _denoiser_paths(f"{original}.{inner}")

    return paths


def _original_blocks(unet: Any) -> dict[str, str]:
    """Block or layer of diffusers' UNet -> that of the original code, which counts through all levels."""
    blocks = dict(_UNET_LAYERS)
    count = 1
    for level, block in enumerate(unet.down_blocks):
        for number in range(len(block.resnets)):
            blocks[f"down_blocks.{level}.resnets.{number}"] = f"input_blocks.{count}.0"
            blocks[f"down_blocks.{level}.attentions.{number}"] = f"input_blocks.{count}.1"
            count += 1
        if block.downsamplers:
            blocks[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{count}.0.op"
            count += 1
    middle = ("resnets.0", "attentions.0", "resnets.1")
    blocks |= {f"mid_block.{part}": f"middle_block.{number}" for number, part in enumerate(middle)}
    count = 0
    for level, block in enumerate(unet.up_blocks):
        for number in range(len(block.resnets)):
            blocks[f"up_blocks.{level}.resnets.{number}"] = f"output_blocks.{count}.0"
            blocks[f"up_blocks.{level}.attentions.{number}"] = f"output_blocks.{count}.1"
            count += 1
        if block.upsamplers:
            position = 2 if getattr(block, "attentions", None) else 1
            blocks[f"up_blocks.{level}.upsamplers.0.conv"] = f"output_blocks.{count - 1}.{position}.conv"
    return blocks


def _flux_layers(transformer: Any) -> dict[str, tuple[Target, ...]]:
    layers = dict(transformer.named_modules())
    blocks = max(len(transformer.transformer_blocks), len(transformer.single_transformer_blocks))
    found: dict[str, tuple[Target, ...]] = {}
    for original, parts in _FLUX_LAYERS.items():
        for number in range(blocks if "{}" in original else 1):
            names = [part.format(number) for part in parts]
            if all(name in layers for name in names):
                found[original.format(number).replace(".", "_")] = tuple(_concatenated(names, layers))
    # The original code has the shift first, diffusers the scale.
    half = layers["norm_out.linear"].out_features // 2
    swapped = slice(half, None), slice(0, half)
    name = "final_layer_adaLN_modulation_1"
    return {**found, name: (Target("transformer.norm_out.linear", layers["norm_out.linear"], swapped),)}


def _concatenated(names: list[str], layers: dict[str, Any]) -> Iterator[Target]:
    start = 0
    for name in names:
        if len(names) == 1:
            yield Target(f"transformer.{name}", layers[name])
        else:
            end = start + layers[name].out_features
            yield Target(f"transformer.{name}", layers[name], (slice(start, end),))
            start = end
