"""Settings: read once, see `setting_sources`, then frozen and passed on by argument.

A setting is a field with a description. Its flag and its environment name follow from the field:
`queue_timeout_s` is `--queue-timeout` and `HYPERGEN_QUEUE_TIMEOUT`. The unit stays in the field's name and
description.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator

from hypergen.served_model_config import ModelEntry, NamedSources, read_entries

Device = Literal["cuda", "cpu", "mps"]
Dtype = Literal["float16", "bfloat16", "float32"]
Determinism = Literal["strict", "fast"]
Compile = Literal["off", "on", "graphs"]
VaeTiling = Literal["off", "on", "auto"]
Offload = Literal["off", "model"]
Quantization = Literal["off", "int8", "fp8"]
Attention = Literal["flash", "cudnn", "efficient", "math"]


class EngineSettings(BaseModel, frozen=True, extra="forbid"):
    """How an engine process uses its accelerator."""

    device: Device | None = Field(
        None, description="where the model runs; absent: cuda, mps or cpu, the first there is"
    )
    dtype: Dtype | None = Field(
        None, description="precision of the weights; absent: chosen for model and device"
    )
    refiner: str | None = Field(
        None,
        description="the SDXL refiner that runs the last steps of requests that enable it: hub id, folder, "
        ".safetensors checkpoint or model-store tag",
    )
    model_memory_gb: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="memory that the weights of several models may take together, in GB; the one used "
        "longest ago is moved out for another. Absent: 80 % of a GPU's memory, elsewhere no limit",
    )
    max_batch_size: int = Field(8, ge=1, le=256, description="images per denoising step")
    determinism: Determinism = Field(
        "strict",
        description="strict: the same seed gives the same bytes, whatever shares the batch; "
        "fast: without that promise, without replaced layers and without batches of one image",
    )
    aging: float = Field(
        0.2,
        ge=0,
        le=10,
        allow_inf_nan=False,
        description="how much a waiting image gains on shorter ones, in seconds of work per second of wait; "
        "0: the shortest always goes first",
    )
    prompt_cache_mb: int = Field(
        512, ge=0, description="memory for prompt embeddings, in MB; 0 turns the cache off"
    )
    max_prompt_chunks: int = Field(
        4,
        ge=1,
        le=64,
        description="prompts are encoded in chunks of 75 tokens, up to this many; the rest is truncated",
    )
    compile: Compile = Field(
        "off",
        description="compile the denoiser for batches of 2, 4, 8 ... rows; graphs: and replay them as CUDA "
        "graphs. Takes minutes at the start; TORCHINDUCTOR_CACHE_DIR keeps the result",
    )
    channels_last: bool = Field(False, description="keep images in memory channel by channel last")
    attention: Attention | None = Field(
        None, description="kernel of scaled dot product attention; absent: torch chooses"
    )
    decode_stream: bool = Field(
        False, description="decode images on a CUDA stream of their own, beside the next step"
    )
    batched_euler: bool = Field(
        True, description="step all images of a batch that use Euler's sampler together"
    )
    vae_tiling: VaeTiling = Field(
        "off",
        description="encode and decode images in tiles of 512 pixels, which takes less memory and changes "
        "pixels; auto: only those that the device's memory would not hold at once (CUDA)",
    )
    offload: Offload = Field(
        "off",
        description="model: text encoders, denoiser and decoder take turns on the accelerator and wait in "
        "main memory, for models that do not fit at once; slower, and without LoRAs",
    )
    quantization: Quantization = Field(
        "off",
        description="8-bit weights in the denoiser's linear layers, by torchao (extra `quantization`): half "
        "of what 16 bits take; changes pixels",
    )
    prompt_weighting: bool = Field(
        False,
        description="read (word:1.3), (word) and [word] in prompts as weights; for models with CLIP encoders",
    )
    lora: tuple[str, ...] = Field(
        (),
        description="a LoRA file, NAME=PATH; a PATH alone is used by every request that names no LoRA",
    )
    lora_dir: tuple[Path, ...] = Field(
        (), description="folder of LoRA files; requests use the names of the files, or their paths"
    )
    max_loras: int = Field(4, ge=1, le=16, description="LoRAs that one request may mix")
    max_lora_rank: int = Field(
        32,
        ge=1,
        le=256,
        description="LoRAs up to this rank are filled up to it and computed together; larger ones run beside "
        "them. Another value changes the last bits of images with LoRAs",
    )
    max_lora_mb: float = Field(2048, gt=0, allow_inf_nan=False, description="largest LoRA file, in MB")
    lora_cache_mb: float = Field(
        1024,
        ge=0,
        allow_inf_nan=False,
        description="memory for loaded LoRAs, in MB; the first to go are those used longest ago",
    )
    controlnet: NamedSources = Field(
        default_factory=dict[str, str],
        description="control model that requests may name: NAME=SOURCE, SOURCE a folder or a hub id, which "
        "may end in @REVISION; several in HYPERGEN_CONTROLNET stand with commas between them",
    )
    engine_stall_timeout_s: float = Field(
        300,
        gt=0,
        allow_inf_nan=False,
        description="seconds without a step after which a busy engine is started again",
    )

    @field_validator("lora", "lora_dir", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """In the environment a list is one text, its items separated as in PATH."""
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value


class QueueSettings(BaseModel, frozen=True, extra="forbid"):
    """How many requests wait, where, and for how long."""

    max_queue_size: int = Field(
        100, ge=1, description="requests in the queue; more wait in the overflow queue"
    )
    queue_timeout_s: float = Field(
        600,
        ge=0,
        allow_inf_nan=False,
        description="seconds in the overflow queue before 429; 0 refuses at once",
    )
    max_input_image_mb: float = Field(
        1024,
        gt=0,
        allow_inf_nan=False,
        description="memory in MB for the input images of unfinished requests, beyond which they get 429; "
        "as much for bodies that are being read, and for finished images on their way, beyond which the "
        "client is disconnected that has taken nothing for the longest time",
    )
    request_timeout_s: float = Field(
        3600, gt=0, allow_inf_nan=False, description="seconds a request may take in all before 504"
    )
    drain_timeout_s: float = Field(
        60,
        ge=0,
        allow_inf_nan=False,
        description="seconds that accepted requests get when the server is stopped",
    )


class ServerSettings(BaseModel, frozen=True, extra="forbid"):
    """What the HTTP half listens to, believes and gives out."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 is every address of the machine"
    )
    port: int = Field(8000, ge=1, le=65535, description="TCP port to listen on")
    api_key: str | None = Field(
        None,
        min_length=1,
        repr=False,
        description="bearer key that requests must carry; absent: no authentication",
    )
    api_key_file: Path | None = Field(None, description="file whose lines are bearer keys")
    allowed_host: tuple[str, ...] = Field(
        (),
        description="host name that clients know this server by, beside its address, localhost and IP "
        "addresses; several in HYPERGEN_ALLOWED_HOST stand with commas between them",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$",
        description="address that clients know this server by, for `url` results; absent: as asked",
    )
    max_side: int = Field(2048, ge=64, le=8192, description="longest width or height of an image, in pixels")
    max_steps: int = Field(150, ge=1, le=150, description="most denoising steps of an image")
    max_megapixel_steps: float = Field(
        6300, gt=0, allow_inf_nan=False, description="work of one request: images x steps x megapixels"
    )
    max_body_mb: float = Field(24, gt=0, allow_inf_nan=False, description="largest request body, in MB")
    max_text_body_mb: float = Field(
        1, gt=0, allow_inf_nan=False, description="largest request body without input images, in MB"
    )
    price_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="price of one 1024x1024 image with 25 steps, for the header x-hypergen-price of "
        "Hyperbolic answers and for hypergen_price_total in /metrics; absent: neither",
    )
    image_metadata: bool = Field(True, description="write prompt, seed and settings into the image's file")
    url_lifetime_s: float = Field(
        3600, ge=60, allow_inf_nan=False, description="seconds that a `url` result can be fetched"
    )
    max_jobs: int = Field(1000, ge=1, description="jobs that are kept, finished and unfinished")
    url_storage_mb: float = Field(
        1024,
        gt=0,
        allow_inf_nan=False,
        description="disk space for `url` results, in MB; the oldest go first",
    )

    @field_validator("allowed_host")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", host):
                raise ValueError("a host is a name without scheme, port and path, such as images.example")
        return tuple(host.rstrip(".").lower() for host in hosts)

    @field_validator("allowed_host", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return (
            tuple(part.strip() for part in value.split(",") if part.strip())
            if isinstance(value, str)
            else value
        )


class Settings(BaseModel, frozen=True, extra="forbid"):
    """All settings of one server."""

    models: Annotated[tuple[ModelEntry, ...], BeforeValidator(read_entries)] = Field(
        (),
        description="models to serve: each a hub id, folder, .safetensors checkpoint, model-store tag, "
        "served-model file, or its fields; absent: the embedded model",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    single_file_config: str | None = Field(
        None,
        description="folder, hub id or store tag that a model in one file takes configuration, vocabularies "
        "and missing parts from; absent: looked for beside the file, in the store and on the hub",
    )
    served_model_name: str | None = Field(
        None, description="id in /v1/models; absent: what was given as model"
    )
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings.model_validate({}))
    queue: QueueSettings = Field(default_factory=lambda: QueueSettings.model_validate({}))
    server: ServerSettings = Field(default_factory=lambda: ServerSettings.model_validate({}))
