"""Checkpoint files in the layouts in which people have them; a new layout is one entry of a table."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor

from tests.support.original_layout import original_tensors, original_tensors_sd3
from tests.support.small_models import EDM_LATENTS, save_flux, save_playground, save_sd, save_sd3, save_sdxl

Tensors = dict[str, Tensor]
_UNET = "model.diffusion_model."
_CLIP = "cond_stage_model.transformer."


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A checkpoint in one file.

    Attributes:
        save: saves the model in diffusers' layout, which is what the file means.
        tensors: the file's tensors, of a pipeline of that folder.
        metadata: of the file's header.
        configuration: saves the folder that the file's configuration comes from; None: as `save`.
        options: of its served-model file.
    """

    save: Callable[[Path], Path]
    tensors: Callable[[Any], Tensors]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    configuration: Callable[[Path], Path] | None = None
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def build(self, folder: Path) -> tuple[Path, Path, Path]:
        """The checkpoint file, its configuration folder without weights, and the model as a folder."""
        model = self.save(folder / "model")
        file = folder / "checkpoint file.safetensors"
        tensors = self.tensors(DiffusionPipeline.from_pretrained(model))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, dict(self.metadata))
        source = (self.configuration or self.save)(folder / "source")
        configuration = shutil.copytree(source, folder / "configuration")
        for component, starts in _PREFIXES.items():
            if component in ("unet", "transformer") or any(name.startswith(starts) for name in tensors):
                for weights in (configuration / component).glob("*.safetensors"):
                    weights.unlink()
        return file, Path(configuration), model


# Component -> starts of its tensors' names in files with more than a denoiser.
_PREFIXES = {
    "unet": (_UNET,),
    "transformer": (_UNET,),
    "vae": ("first_stage_model.",),
    "text_encoder": ("cond_stage_model.", "conditioner.embedders.0."),
    "text_encoder_2": ("conditioner.embedders.1.",),
}


def with_fields(save: Callable[[Path], Path], file: str, **fields: Any) -> Callable[[Path], Path]:
    """A save with other fields in one of its configuration files."""

    def saved(folder: Path) -> Path:
        path = save(folder) / file
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))
        return folder

    return saved


def fp8_weights(save: Callable[[Path], Path], denoiser: str) -> Callable[[Path], Path]:
    """A save whose denoiser's matrices are exactly a scale times 8-bit floating point numbers."""

    def saved(folder: Path) -> Path:
        pipeline: Any = DiffusionPipeline.from_pretrained(save(folder))
        network = getattr(pipeline, denoiser)
        for weight in network.parameters():
            if weight.dim() == 2:
                scale = _scale(weight.data)
                weight.data = (weight.data / scale).to(torch.float8_e4m3fn).float() * scale
        network.save_pretrained(folder / denoiser)
        return folder

    return saved


def scaled_fp8(tensors: Tensors, prefix: str, *, newer: bool = False) -> Tensors:
    """Matrices as 8-bit floating point numbers with a scale, as in ComfyUI's `fp8_scaled` files.

    Args:
        newer: with the names and notes of later files.
    """
    scaled: Tensors = {}
    for name, tensor in tensors.items():
        if not (name.startswith(prefix) and name.endswith(".weight") and tensor.dim() == 2):
            scaled[name] = tensor
            continue
        scale = _scale(tensor)
        layer = name.removesuffix(".weight")
        scaled[name] = (tensor / scale).to(torch.float8_e4m3fn)
        scaled[f"{layer}.weight_scale" if newer else f"{layer}.scale_weight"] = torch.tensor(scale)
        if newer:
            note = json.dumps({"format": "float8_e4m3fn"}).encode()
            scaled[f"{layer}.comfy_quant"] = torch.tensor(list(note), dtype=torch.uint8)
        else:
            scaled[f"{layer}.scale_input"] = torch.tensor(1.0)
    if not newer:
        scaled[f"{prefix}scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
    return scaled


def _scale(weight: Tensor) -> float:
    return 2.0 ** math.ceil(math.log2(float(weight.abs().max()) / 448))


def _without_text_model(tensors: Tensors) -> Tensors:
    return {name.replace(f"{_CLIP}text_model.", _CLIP): tensor for name, tensor in tensors.items()}


def _with(tensors: Callable[[Any], Tensors], **added: Tensor) -> Callable[[Any], Tensors]:
    return lambda pipeline: tensors(pipeline) | {name: tensor.clone() for name, tensor in added.items()}


def _transformer(pipeline: Any) -> Tensors:
    return pipeline.transformer.state_dict()


_V_PREDICTION = with_fields(
    save_sdxl,
    "scheduler/scheduler_config.json",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    timestep_spacing="trailing",
)
_EMPTY = torch.empty(0)
_EDM_MARKERS = {
    f"edm_{name}": torch.tensor(EDM_LATENTS[f"latents_{name}"]).reshape(1, 4, 1, 1)
    for name in ("mean", "std")
}
_HARMLESS = {
    "model_ema.decay": torch.ones(()),
    "alphas_cumprod": torch.ones(1000),
    f"{_CLIP}text_model.embeddings.position_ids": torch.arange(77)[None],
    "cond_stage_model.logit_scale": torch.ones(()),
    f"{_CLIP}text_projection.weight": torch.ones(32, 32),
}

LAYOUTS: dict[str, Layout] = {
    "SD 1.5": Layout(save=save_sd, tensors=original_tensors),
    "SD 1.5 merge": Layout(
        save=save_sd, tensors=lambda pipeline: _without_text_model(original_tensors(pipeline))
    ),
    "SD 1.5 with tensors of its training": Layout(save=save_sd, tensors=_with(original_tensors, **_HARMLESS)),
    "SD 2.1": Layout(
        save=partial(save_sd, prediction_type="v_prediction"),
        tensors=partial(original_tensors, second_version=True),
        configuration=save_sd,
        metadata={"modelspec.architecture": "stable-diffusion-v2-768-v"},
    ),
    "SD 2 base, by its served-model file": Layout(
        save=save_sd,
        tensors=partial(original_tensors, second_version=True),
        configuration=partial(save_sd, prediction_type="v_prediction"),
        options={"prediction_type": "epsilon"},
    ),
    "SDXL": Layout(save=save_sdxl, tensors=original_tensors),
    "SDXL v-prediction, by markers": Layout(
        save=_V_PREDICTION,
        tensors=_with(original_tensors, v_pred=_EMPTY, ztsnr=_EMPTY),
        configuration=save_sdxl,
    ),
    "SDXL v-prediction, by metadata": Layout(
        save=_V_PREDICTION,
        tensors=original_tensors,
        configuration=save_sdxl,
        metadata={"modelspec.prediction_type": "v", "ss_zero_terminal_snr": "True"},
    ),
    "SDXL v-prediction, by its served-model file": Layout(
        save=_V_PREDICTION,
        tensors=original_tensors,
        configuration=save_sdxl,
        options={"prediction_type": "v_prediction", "zero_terminal_snr": True},
    ),
    "SDXL v-prediction, whatever copied metadata say": Layout(
        save=_V_PREDICTION,
        tensors=_with(original_tensors, v_pred=_EMPTY, ztsnr=_EMPTY),
        configuration=save_sdxl,
        metadata={"modelspec.prediction_type": "epsilon"},
    ),
    "Playground 2.5": Layout(
        save=save_playground, tensors=_with(original_tensors, **_EDM_MARKERS), configuration=save_sdxl
    ),
    "SDXL fp8_scaled": Layout(
        save=fp8_weights(save_sdxl, "unet"),
        tensors=lambda pipeline: scaled_fp8(original_tensors(pipeline), _UNET),
    ),
    "FLUX fp8_scaled": Layout(
        save=fp8_weights(save_flux, "transformer"),
        tensors=lambda pipeline: scaled_fp8(_transformer(pipeline), ""),
    ),
    "FLUX fp8_scaled, later names": Layout(
        save=fp8_weights(save_flux, "transformer"),
        tensors=lambda pipeline: scaled_fp8(_transformer(pipeline), "", newer=True),
    ),
    "SD 3 without text encoders": Layout(save=save_sd3, tensors=original_tensors_sd3),
}


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A file that is refused by its header.

    Attributes:
        tensors: name -> shape.
        reasons: parts of the message, among them the name of a tensor or field.
    """

    tensors: Mapping[str, tuple[int, ...]]
    reasons: tuple[str, ...]
    metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    dtype: torch.dtype = torch.float16

    def build(self, file: Path) -> Path:
        tensors = {name: torch.zeros(shape, dtype=self.dtype) for name, shape in self.tensors.items()}
        save_file(tensors, file, dict(self.metadata))
        return file


_FLUX_BLOCK = {f"{_UNET}double_blocks.0.img_attn.qkv.weight": (24, 8)}
_SD_UNET = {f"{_UNET}input_blocks.0.0.weight": (8, 4, 3, 3)}
_SDXL_UNET = {**_SD_UNET, f"{_UNET}label_emb.0.0.weight": (8, 8)}
_SD2_ATTENTION = {f"{_UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (8, 1024)}

REFUSED: dict[str, Refused] = {
    "Chroma": Refused(
        tensors={**_FLUX_BLOCK, f"{_UNET}distilled_guidance_layer.in_proj.bias": (8,)},
        reasons=("checkpoint of Chroma", "distilled_guidance_layer.in_proj.bias", "folder"),
    ),
    "FLUX.2": Refused(
        tensors={**_FLUX_BLOCK, "single_stream_modulation.lin.weight": (8, 8)},
        reasons=("checkpoint of FLUX.2", "single_stream_modulation.lin.weight"),
    ),
    "Z-Image": Refused(
        tensors={"cap_pad_token": (1, 8), "layers.0.adaLN_modulation.0.weight": (8, 8)},
        reasons=("checkpoint of Z-Image", "cap_pad_token"),
    ),
    "Qwen-Image": Refused(
        tensors={"transformer_blocks.0.attn.add_q_proj.weight": (8, 8), "txt_norm.weight": (8,)},
        reasons=("checkpoint of Qwen-Image", "txt_norm.weight"),
    ),
    "FLUX.1 Depth": Refused(
        tensors={**_FLUX_BLOCK, "img_in.weight": (8, 128)},
        reasons=("checkpoint of FLUX.1 Canny or Depth", "img_in.weight", "128"),
    ),
    "InstructPix2Pix": Refused(
        tensors={f"{_UNET}input_blocks.0.0.weight": (8, 8, 3, 3)},
        reasons=("checkpoint of InstructPix2Pix", "input_blocks.0.0.weight"),
    ),
    "CosXL": Refused(
        tensors={**_SDXL_UNET, "edm_vpred.sigma_max": (1,)},
        reasons=("checkpoint of CosXL", "edm_vpred.sigma_max"),
    ),
    "bitsandbytes": Refused(
        tensors={**_FLUX_BLOCK, f"{_UNET}double_blocks.0.img_attn.qkv.weight.absmax": (8,)},
        reasons=("format bitsandbytes", "double_blocks.0.img_attn.qkv.weight.absmax", "16-bit"),
    ),
    "8-bit integers": Refused(
        tensors=_FLUX_BLOCK,
        dtype=torch.int8,
        reasons=("integers (I8)", "double_blocks.0.img_attn.qkv.weight"),
    ),
    "ComfyUI's notes of another format": Refused(
        tensors=_FLUX_BLOCK,
        metadata={"_quantization_metadata": json.dumps({"layers": {"double_blocks.0": {"format": "nvfp4"}}})},
        reasons=("format nvfp4", "double_blocks.0"),
    ),
    "an unknown prediction type": Refused(
        tensors=_SDXL_UNET,
        metadata={"modelspec.prediction_type": "velocity field"},
        reasons=("modelspec.prediction_type", "velocity field"),
    ),
    "an expert for a part of the steps": Refused(
        tensors=_SDXL_UNET,
        metadata={"modelspec.timestep_range": "0,200"},
        reasons=("modelspec.timestep_range", "0,200"),
    ),
    "a VAE alone": Refused(
        tensors={"decoder.up.0.block.0.conv1.weight": (8, 8, 3, 3)}, reasons=("is a VAE", "`vae`")
    ),
    "a textual inversion": Refused(tensors={"emb_params": (2, 768)}, reasons=("is a textual inversion",)),
    "a text encoder alone": Refused(
        tensors={"text_model.final_layer_norm.weight": (8,)}, reasons=("is a text encoder",)
    ),
    "SD 2 that does not state its prediction type": Refused(
        tensors={**_SD_UNET, **_SD2_ATTENTION},
        reasons=(
            "prediction_type in a served-model file",
            "v_prediction (sd2-community",
            "epsilon (sd2-comm",
        ),
    ),
}
