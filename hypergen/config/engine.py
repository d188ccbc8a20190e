"""The section `engine`: how an engine process uses its accelerator."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from hypergen.device_names import DeviceType, device_type
from hypergen.served_model_config import NamedSources

from .values import (
    Compile,
    Determinism,
    Devices,
    Dtype,
    Offload,
    Quantization,
    Sizes,
    VaeTiling,
    both_or_none,
)


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """How an engine process uses its accelerator."""

    device: DeviceType | None = Field(
        None,
        description="type of the devices to run models on; absent: the first available of cuda, mps and cpu",
    )
    devices: Devices = Field(
        (),
        description="devices with one engine each, separated by commas, such as cuda:0,cuda:1 or cpu,cpu; "
        "all, or absent: every GPU, else one engine",
    )
    dtype: Dtype | None = Field(
        None, description="precision of the weights; absent: chosen for model and device"
    )
    vae_dtype: Dtype | None = Field(
        None,
        description="dtype of the VAE, for example bfloat16 where float16 overflows; absent: as the model, "
        "and float32 for SDXL in float16",
    )
    refiner: str | None = Field(
        None,
        description="SDXL refiner for the last steps of requests that enable it: hub id, folder, "
        ".safetensors checkpoint or model-store tag",
    )
    model_memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="memory of an engine for the weights of all loaded models, in GB; beyond it, the least "
        "recently used model is evicted. Absent: 80 % of a GPU's memory, no limit on other devices",
    )
    host_memory_gb: float | None = Field(
        None,
        ge=0,
        allow_inf_nan=False,
        description="pinned main memory for the weights of evicted models, in GB, from which a GPU gets them "
        "back in one copy; models without room are loaded from their files again. For each GPU; absent: half "
        "of the memory that is free when the server starts, divided by the GPUs; ignored on other devices",
    )
    idle_unload_s: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="seconds without requests after which an engine frees its accelerator's memory; the next "
        "request waits until its model is loaded again. Absent: models stay in memory",
    )
    max_batch_size: int = Field(8, ge=1, le=256, description="images per batch")
    determinism: Determinism = Field(
        "strict",
        description="strict: the same seed gives the same bytes in every batch; fast: no such guarantee, but "
        "no replaced layers and no reduction to batches of one image",
    )
    aging: float = Field(
        0.2,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="priority that a waiting image gains over shorter ones, in seconds of work per second of "
        "waiting; 0: the shortest always runs first",
    )
    prompt_cache_mb: int = Field(
        512, ge=0, description="memory of an engine for cached prompt embeddings, in MB; 0 disables the cache"
    )
    max_prompt_chunks: int = Field(
        4,
        ge=1,
        le=64,
        description="chunks of 75 tokens per prompt; longer prompts are truncated",
    )
    compile: Compile = Field(
        "off",
        description="compile the denoiser with torch.compile while the model is loaded, which takes minutes "
        "for each of --compile-sizes; the result is kept beside the model store",
    )
    compile_sizes: Sizes = Field(
        (),
        description="WIDTHxHEIGHT to compile for, several separated by commas; absent: the model's default "
        "size. Other sizes, long prompts, LoRAs and ControlNets run uncompiled",
    )
    cuda_graphs: bool = Field(
        True,
        description="run forward passes and the decoder as CUDA graphs, with the same bits; needs CUDA, else "
        "ignored",
    )
    attention: str | None = Field(
        None,
        description="attention backend of diffusers for FLUX and other transformers, such as _flash_3_hub or "
        "sage_hub, whose kernels come from the hub with the package kernels; absent: torch chooses",
    )
    vae_tiling: VaeTiling = Field(
        "off",
        description="VAE tiles of 512 pixels, which take less memory and change pixels; off: tiles only for "
        "images that did not fit into the device's memory",
    )
    offload: Offload = Field(
        "off",
        description="model: keep networks above 1 GB in main memory, and only the running one of them on the "
        "GPU; for models that do not fit otherwise; slower, and without LoRAs",
    )
    quantization: Quantization = Field(
        "off",
        description="8-bit weights in the denoiser's linear layers, by torchao (extra `quantization`): half "
        "the memory of 16 bits; changes pixels",
    )
    prompt_weighting: bool = Field(
        False,
        description="parse (word:1.3), (word) and [word] in prompts as weights; only for CLIP encoders",
    )
    lora: tuple[str, ...] = Field(
        (),
        description="LoRA file, NAME=PATH; a PATH alone is the default LoRA of requests that name none",
    )
    lora_dir: tuple[Path, ...] = Field(
        (), description="folder of LoRA files, which requests name by file name or path"
    )
    max_loras: int = Field(4, ge=1, le=16, description="LoRAs per request")
    max_lora_rank: int = Field(
        32,
        ge=1,
        le=256,
        description="LoRAs up to this rank are padded to it and batched; larger ones are padded to 4 or 16 "
        "times it on a GPU, and run separately on a CPU. Another value changes the last bits of images with "
        "LoRAs",
    )
    max_lora_mb: float = Field(2048, gt=0, allow_inf_nan=False, description="largest LoRA file, in MB")
    lora_cache_mb: float = Field(
        2048,
        ge=0,
        allow_inf_nan=False,
        description="memory of an engine for loaded LoRAs, in MB; the least recently used are evicted first",
    )
    controlnet: NamedSources = Field(
        default_factory=dict[str, str],
        description="ControlNet that requests may name: NAME=SOURCE; SOURCE is a folder or a hub id, which "
        "may end in @REVISION; HYPERGEN_CONTROLNET separates several by commas",
    )
    embedding: NamedSources = Field(
        default_factory=dict[str, str],
        description="textual inversion that prompts use by its name: NAME=FILE; for Stable Diffusion and "
        "SDXL; HYPERGEN_EMBEDDING separates several by commas",
    )
    c2pa_certificate: Path | None = Field(
        None,
        description="certificate chain in PEM, with which images are signed as generated, by C2PA "
        "(package c2pa-python)",
    )
    c2pa_key: Path | None = Field(
        None,
        validate_default=True,
        description="private key of --c2pa-certificate, in PEM without a password",
    )
    safety_checker: str | None = Field(
        None,
        description="content filter, whose refusals are a 400: folder or hub id of a "
        "StableDiffusionSafetyChecker, or package.module:function; without previews",
    )
    engine_stall_timeout_s: float = Field(
        300,
        gt=0,
        allow_inf_nan=False,
        description="seconds without a denoising step after which a busy engine is restarted",
    )

    @property
    def device_type(self) -> DeviceType | None:
        """The type of all devices; None: the first available one."""
        return device_type(self.devices[0]) if self.devices else self.device

    @field_validator("devices")
    @classmethod
    def _check_devices(cls, devices: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        of_device = info.data.get("device")
        if devices and of_device not in (None, device_type(devices[0])):
            raise ValueError(f"must be of the type that --device has, {of_device}")
        return devices

    @field_validator("compile_sizes")
    @classmethod
    def _check_sizes(cls, sizes: Any, info: ValidationInfo) -> Any:
        if sizes and info.data.get("compile") == "off":
            raise ValueError("needs --compile on")
        return sizes

    @field_validator("offload")
    @classmethod
    def _check_offload(cls, offload: Any, info: ValidationInfo) -> Any:
        if offload != "off" and info.data.get("compile") == "on":
            raise ValueError("cannot be combined with --compile on")
        return offload

    @field_validator("c2pa_key")
    @classmethod
    def _check_c2pa(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        return both_or_none(key, info.data.get("c2pa_certificate"))

    @field_validator("lora", "lora_dir", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Split a list from the environment, whose separator is that of PATH."""
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value
