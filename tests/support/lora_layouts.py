"""The layouts of published LoRA files.

A layout is one entry of `LAYOUTS`: the model, the form of tensors, and the layers by the file's names.
"""

from __future__ import annotations

import torch

from tests.support.lora_forms import (
    KOHYA,
    PEFT,
    Layout,
    diff,
    loha,
    loha_tucker,
    lokr,
    norm,
    pair,
    peft_bias,
    tucker,
)


def _block(name: str, layers: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"transformer.{name}.{layer}" for layer in layers)


_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_CLIP = "text_model.encoder.layers.0."
_KOHYA_CLIP = "text_model_encoder_layers_0_"
# Layers of the original FLUX -> diffusers'.
FLUX_LAYERS: dict[str, tuple[str, ...]] = {
    "double_blocks.0.img_attn.qkv": _block("transformer_blocks.0", _QKV),
    "double_blocks.0.txt_attn.qkv": _block(
        "transformer_blocks.0", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
    ),
    "double_blocks.0.img_attn.proj": _block("transformer_blocks.0", ("attn.to_out.0",)),
    "double_blocks.0.txt_attn.proj": _block("transformer_blocks.0", ("attn.to_add_out",)),
    "double_blocks.0.img_mlp.2": _block("transformer_blocks.0", ("ff.net.2",)),
    "double_blocks.0.txt_mlp.0": _block("transformer_blocks.0", ("ff_context.net.0.proj",)),
    "double_blocks.0.img_mod.lin": _block("transformer_blocks.0", ("norm1.linear",)),
    "double_blocks.0.txt_mod.lin": _block("transformer_blocks.0", ("norm1_context.linear",)),
    "single_blocks.0.linear1": _block("single_transformer_blocks.0", (*_QKV, "proj_mlp")),
    "single_blocks.0.linear2": _block("single_transformer_blocks.0", ("proj_out",)),
    "single_blocks.0.modulation.lin": _block("single_transformer_blocks.0", ("norm.linear",)),
    "img_in": ("transformer.x_embedder",),
    "txt_in": ("transformer.context_embedder",),
    "time_in.in_layer": ("transformer.time_text_embed.timestep_embedder.linear_1",),
    "vector_in.out_layer": ("transformer.time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("transformer.time_text_embed.guidance_embedder.linear_1",),
    "final_layer.linear": ("transformer.proj_out",),
    "final_layer.adaLN_modulation.1": ("transformer.norm_out.linear", "swapped"),
}
_FLUX_DIFFUSERS = (
    "transformer_blocks.0.attn.to_q",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.ff.net.0.proj",
    "transformer_blocks.0.norm1_context.linear",
    "single_transformer_blocks.0.proj_mlp",
    "single_transformer_blocks.0.norm.linear",
    "x_embedder",
)
_UNET_ORIGINAL = {
    "input_blocks.0.0": "conv_in",
    "input_blocks.1.0.in_layers.2": "down_blocks.0.resnets.0.conv1",
    "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
    "input_blocks.4.0.skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    ),
    "input_blocks.8.1.proj_out": "down_blocks.2.attentions.1.proj_out",
    "middle_block.0.emb_layers.1": "mid_block.resnets.0.time_emb_proj",
    "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
    "output_blocks.1.1.transformer_blocks.0.attn1.to_out.0": (
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0"
    ),
    "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
    "output_blocks.5.0.out_layers.3": "up_blocks.1.resnets.2.conv2",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "out.2": "conv_out",
}
_UNET_DIFFUSERS = (
    "conv_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0",
    "down_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj",
    "mid_block.attentions.0.transformer_blocks.0.attn2.to_v",
    "mid_block.resnets.1.conv1",
)
_IN_UNET = {name: (f"unet.{name}",) for name in _UNET_DIFFUSERS}
_CONVOLUTION = {"lora_unet_mid_block_resnets_1_conv1": ("unet.mid_block.resnets.1.conv1",)}
_LINEAR = {
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2": (
        "unet.mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    )
}


def _flat(prefix: str, layers: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """Names as Kohya's scripts write them."""
    return {prefix + name.replace(".", "_"): targets for name, targets in layers.items()}


def _dotted(prefix: str, layers: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    return {prefix + name: targets for name, targets in layers.items()}


_FLUX_SELF = {name: (f"transformer.{name}",) for name in _FLUX_DIFFUSERS}
_UNET_SELF = {name: (f"unet.{layer}",) for name, layer in _UNET_ORIGINAL.items()}

LAYOUTS: dict[str, Layout] = {
    "Kohya FLUX": Layout("flux", KOHYA, _flat("lora_unet_", FLUX_LAYERS)),
    "Kohya FLUX with CLIP and T5": Layout(
        "flux",
        KOHYA,
        {
            "lora_unet_double_blocks_0_img_attn_proj": ("transformer.transformer_blocks.0.attn.to_out.0",),
            f"lora_te1_{_KOHYA_CLIP}mlp_fc1": ("text_encoder.encoder.layers.0.mlp.fc1",),
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q": (
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q",
            ),
            "lora_te3_encoder_block_0_layer_1_DenseReluDense_wo": (
                "text_encoder_2.encoder.block.0.layer.1.DenseReluDense.wo",
            ),
        },
    ),
    "ComfyUI's extraction": Layout(
        "flux",
        KOHYA,
        {
            **_dotted("diffusion_model.", FLUX_LAYERS),
            "diffusion_model.double_blocks.0.img_attn.norm.query_norm": (
                "transformer.transformer_blocks.0.attn.norm_q",
            ),
            "diffusion_model.single_blocks.0.norm.key_norm": (
                "transformer.single_transformer_blocks.0.attn.norm_k",
            ),
            f"text_encoders.clip_l.transformer.{_CLIP}self_attn.q_proj": (
                "text_encoder.encoder.layers.0.self_attn.q_proj",
            ),
            f"text_encoders.clip_l.transformer.{_CLIP}layer_norm1": (
                "text_encoder.encoder.layers.0.layer_norm1",
            ),
        },
        forms={
            "diffusion_model.double_blocks.0.img_attn.norm.query_norm": diff,
            "diffusion_model.single_blocks.0.norm.key_norm": diff,
            f"text_encoders.clip_l.transformer.{_CLIP}layer_norm1": diff,
            "diffusion_model.img_in": diff,
        },
        biases={
            "diffusion_model.img_in.diff_b": "transformer.x_embedder",
            "diffusion_model.double_blocks.0.img_attn.proj.diff_b": (
                "transformer.transformer_blocks.0.attn.to_out.0"
            ),
            "diffusion_model.double_blocks.0.txt_mlp.2.diff_b": (
                "transformer.transformer_blocks.0.ff_context.net.2"
            ),
            f"text_encoders.clip_l.transformer.{_CLIP}layer_norm1.diff_b": (
                "text_encoder.encoder.layers.0.layer_norm1"
            ),
        },
        extra={
            "text_encoders.clip_l.transformer.text_projection.lora_down.weight": torch.ones(2, 32),
            "text_encoders.clip_l.transformer.text_projection.lora_up.weight": torch.ones(32, 2),
            "text_encoders.clip_l.transformer.text_model.embeddings.position_embedding.diff": torch.zeros(
                77, 32
            ),
        },
    ),
    "both naming schemes": Layout(
        "flux",
        KOHYA,
        {
            "lora_unet_double_blocks_0_img_attn_proj": ("transformer.transformer_blocks.0.attn.to_out.0",),
            "transformer.single_transformer_blocks.0.proj_mlp": (
                "transformer.single_transformer_blocks.0.proj_mlp",
            ),
        },
    ),
    "OneTrainer FLUX": Layout(
        "flux",
        KOHYA,
        {
            **_flat("lora_transformer_", _FLUX_SELF),
            "lora_te2_encoder_block_0_layer_0_SelfAttention_o": (
                "text_encoder_2.encoder.block.0.layer.0.SelfAttention.o",
            ),
        },
        header={"modelspec.architecture": "flux-1-dev/lora"},
    ),
    "XLabs": Layout(
        "flux",
        pair(".down.weight", ".up.weight"),
        {
            "double_blocks.0.processor.qkv_lora1": FLUX_LAYERS["double_blocks.0.img_attn.qkv"],
            "double_blocks.0.processor.proj_lora2": FLUX_LAYERS["double_blocks.0.txt_attn.proj"],
            "single_blocks.0.processor.qkv_lora": _block("single_transformer_blocks.0", _QKV),
            "single_blocks.0.processor.proj_lora": FLUX_LAYERS["single_blocks.0.linear2"],
        },
    ),
    "diffusers FLUX": Layout("flux", PEFT, _dotted("transformer.", _FLUX_SELF)),
    "diffusers' paths with Kohya's endings": Layout("flux", KOHYA, _dotted("transformer.", _FLUX_SELF)),
    "diffusion_model and PEFT's endings": Layout("flux", PEFT, _dotted("diffusion_model.", FLUX_LAYERS)),
    "PEFT of the original FLUX": Layout(
        "flux",
        PEFT,
        _dotted("base_model.model.", FLUX_LAYERS),
        config={"peft_type": "LORA", "r": 4, "lora_alpha": 4},
    ),
    "PEFT, with alpha by layer and rank-stabilized": Layout(
        "flux",
        PEFT,
        _dotted("base_model.model.", _FLUX_SELF),
        forms={"base_model.model.x_embedder": pair(".lora_A.weight", ".lora_B.weight", rank=9)},
        config={
            "peft_type": "LORA",
            "r": 4,
            "lora_alpha": 8,
            "use_rslora": True,
            "rank_pattern": {"x_embedder": 9},
            "alpha_pattern": {"attn.to_q": 3},
        },
        scale=lambda name: (
            8 / 3 if name.endswith("x_embedder") else (3 if name.endswith("to_q") else 8) / 4**0.5
        ),
    ),
    "PEFT with biases": Layout(
        "flux",
        peft_bias,
        {"transformer.x_embedder": ("transformer.x_embedder",)},
        biases={"transformer.x_embedder.lora_B.bias": "transformer.x_embedder"},
    ),
    "LyCORIS FLUX, LoKr": Layout("flux", lokr("full", "product"), _flat("lycoris_", _FLUX_SELF)),
    "Kohya SDXL": Layout(
        "sdxl",
        KOHYA,
        {
            **_flat("lora_unet_", _UNET_SELF),
            f"lora_te1_{_KOHYA_CLIP}mlp_fc1": ("text_encoder.encoder.layers.0.mlp.fc1",),
            # Without out_proj: resized and block-weighted files.
            f"lora_te2_{_KOHYA_CLIP}self_attn_q_proj": (
                "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj",
            ),
            "lora_te2_text_projection": ("text_encoder_2.text_projection",),
        },
        header={"ss_base_model_version": "sdxl_base_v1-0"},
    ),
    "Kohya with diffusers' paths": Layout("sdxl", KOHYA, _flat("lora_unet_", _IN_UNET)),
    "diffusers": Layout("sdxl", PEFT, _dotted("unet.", _IN_UNET)),
    "PEFT's default name": Layout(
        "sdxl",
        pair(".lora_A.default.weight", ".lora_B.default.weight"),
        _dotted("base_model.model.", _IN_UNET),
    ),
    "unet and original blocks": Layout("sdxl", PEFT, _dotted("unet.", _UNET_SELF)),
    "diffusers before PEFT": Layout(
        "sdxl",
        pair("_lora.down.weight", "_lora.up.weight"),
        {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out": (
                "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0",
            ),
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q": (
                "text_encoder.encoder.layers.0.self_attn.q_proj",
            ),
        },
    ),
    "LoHa": Layout("sdxl", loha, {**_flat("lora_unet_", _IN_UNET), **_LINEAR}),
    "LoHa with a core": Layout("sdxl", loha_tucker, _CONVOLUTION),
    "LoKr": Layout("sdxl", lokr("full", "product"), {**_CONVOLUTION, **_LINEAR}),
    "LoKr of two products": Layout("sdxl", lokr("product", "product"), {**_CONVOLUTION, **_LINEAR}),
    "LoKr of two full matrices": Layout("sdxl", lokr("full", "full"), {**_CONVOLUTION, **_LINEAR}),
    "LoKr with a core": Layout("sdxl", lokr("full", "core"), _CONVOLUTION),
    "LoCon with a core": Layout("sdxl", tucker, _CONVOLUTION),
    "LyCORIS full": Layout("sdxl", diff, {**_flat("lora_unet_", _IN_UNET), **_LINEAR}),
    "LyCORIS norms": Layout(
        "sdxl",
        norm,
        {
            "lora_unet_mid_block_resnets_0_norm1": ("unet.mid_block.resnets.0.norm1",),
            "lora_unet_input_blocks_1_0_out_layers_0": ("unet.down_blocks.0.resnets.0.norm2",),
            "lora_unet_mid_block_attentions_0_transformer_blocks_0_norm2": (
                "unet.mid_block.attentions.0.transformer_blocks.0.norm2",
            ),
        },
        biases={"lora_unet_mid_block_resnets_0_norm1.b_norm": "unet.mid_block.resnets.0.norm1"},
    ),
}
