"""Settings: loaded once by `load_settings`, then immutable and passed as arguments.

A setting is a field with a description. Its flag and environment variable follow from the field's name:
`queue_timeout_s` is `--queue-timeout` and `HYPERGEN_QUEUE_TIMEOUT`. The field's name and description have
the unit.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from ipaddress import ip_network
from pathlib import Path
from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, BeforeValidator, Field, ValidationInfo, field_validator

from hypergen.device_names import DeviceType, device_type, read_devices
from hypergen.served_model_config import ModelEntry, NamedSources, read_entries

Dtype = Literal["float16", "bfloat16", "float32"]
Determinism = Literal["strict", "fast"]
LogFormat = Literal["text", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


def _read_on_off(value: Any) -> Any:
    """YAML reads on and off as booleans."""
    return ("on" if value else "off") if isinstance(value, bool) else value


_OnOff = BeforeValidator(_read_on_off)
Compile = Annotated[Literal["off", "on"], _OnOff]
VaeTiling = Annotated[Literal["off", "on"], _OnOff]
Offload = Annotated[Literal["off", "model"], _OnOff]
Quantization = Annotated[Literal["off", "int8", "fp8"], _OnOff]


def _read_sizes(value: Any) -> Any:
    """Parse WIDTHxHEIGHT, one or several separated by commas, or a list of them."""
    if not isinstance(value, (str, list, tuple)):
        return value
    given = [value] if isinstance(value, str) else cast(Sequence[Any], value)
    return tuple(dict.fromkeys(_read_size(part) for entry in given for part in str(entry).split(",")))


def _read_size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"\s*(\d+)x(\d+)\s*", text)
    width, height = map(int, match.groups()) if match else (0, 0)
    if any(side % 8 or not 64 <= side <= 8192 for side in (width, height)):
        raise ValueError(
            "must be sizes such as 1024x1024,512x512: width and height are multiples of 8, from 64 to 8192"
        )
    return width, height


# A bucket, and a prefix of characters that need no escaping in URLs; none of its parts begins with a dot.
_STORAGE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?!.*/[/.])(/[A-Za-z0-9_./-]*)?")
_MAX_PRESIGNED_S = 7 * 24 * 3600

Devices = Annotated[tuple[str, ...], BeforeValidator(read_devices)]
Sizes = Annotated[tuple[tuple[int, int], ...], BeforeValidator(_read_sizes)]


def _both_or_none(key: Path | None, certificate: Path | None) -> Path | None:
    if (key is None) != (certificate is None):
        raise ValueError("certificate and key must be given together")
    return key


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
        description="LoRAs up to this rank are padded to it and batched; larger ones run separately. Another "
        "value changes the last bits of images with LoRAs",
    )
    max_lora_mb: float = Field(2048, gt=0, allow_inf_nan=False, description="largest LoRA file, in MB")
    lora_cache_mb: float = Field(
        1024,
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

    @field_validator("c2pa_key")
    @classmethod
    def _check_c2pa(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        return _both_or_none(key, info.data.get("c2pa_certificate"))

    @field_validator("lora", "lora_dir", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """Split a list from the environment, whose separator is that of PATH."""
        return tuple(part for part in value.split(os.pathsep) if part) if isinstance(value, str) else value


class QueueSettings(BaseModel, frozen=True, extra="forbid"):
    """Limits of the request queue and of the overflow queue."""

    max_queue_size: int = Field(
        100, ge=1, description="requests in the queue; more wait in the overflow queue"
    )
    queue_timeout_s: float = Field(
        600,
        ge=0,
        allow_inf_nan=False,
        description="seconds in the overflow queue before 429; 0: 429 at once",
    )
    max_input_image_mb: float = Field(
        1024,
        gt=0,
        allow_inf_nan=False,
        description="memory for the input images of unfinished requests, in MB; further ones get 429. The "
        "same limit applies to bodies being read, and to finished images being sent; beyond the latter, the "
        "client that has read nothing for the longest time is disconnected",
    )
    request_timeout_s: float = Field(
        3600, gt=0, allow_inf_nan=False, description="seconds that a request may take in total before 504"
    )
    drain_timeout_s: float = Field(
        60,
        ge=0,
        allow_inf_nan=False,
        description="seconds that accepted requests have to finish when the server is stopped",
    )


class ServerSettings(BaseModel, frozen=True, extra="forbid"):
    """The HTTP half: addresses, authentication, limits and results."""

    host: str = Field(
        "127.0.0.1", description="address to listen on; 0.0.0.0 is every address of the machine"
    )
    port: int = Field(8000, ge=0, le=65535, description="TCP port to listen on; 0: a free one")
    ssl_certfile: Path | None = Field(
        None, description="TLS certificate with its chain, in PEM; the server then speaks HTTPS only"
    )
    ssl_keyfile: Path | None = Field(
        None, validate_default=True, description="key of the TLS certificate, in PEM"
    )
    backlog: int = Field(2048, ge=64, description="connections that may wait to be accepted")
    root_path: str = Field(
        "",
        pattern=r"^(/[^\s?#]*[^\s?#/])?$",
        description="path below which a proxy publishes the server, such as /images, for /openapi.json and "
        "`url` results; the proxy removes it",
    )
    api_key: str | None = Field(
        None,
        min_length=1,
        repr=False,
        description="bearer key that requests must carry; absent: no authentication",
    )
    api_key_file: Path | None = Field(
        None,
        description="file of bearer keys, one per line, with names and limits; read again when it changes",
    )
    log_format: LogFormat = Field(
        "text", description="form of the log's lines on standard error: text, or one JSON object per line"
    )
    log_level: LogLevel = Field("info", description="least severe level that is logged")
    allowed_host: tuple[str, ...] = Field(
        (),
        description="further host name that clients may use, in addition to the server's address, localhost "
        "and IP addresses; HYPERGEN_ALLOWED_HOST separates several by commas",
    )
    cors_origin: tuple[str, ...] = Field(
        (),
        description="origin, such as https://app.example, whose web pages may use the server from a browser; "
        "* is every origin; HYPERGEN_CORS_ORIGIN separates several by commas",
    )
    trusted_proxy: tuple[str, ...] = Field(
        (),
        description="address or network, such as 10.0.0.0/8, of a proxy whose X-Forwarded-For and "
        "X-Forwarded-Proto count; * is every client; HYPERGEN_TRUSTED_PROXY separates several by commas",
    )
    keep_alive_s: float = Field(
        75,
        gt=0,
        allow_inf_nan=False,
        description="seconds for which a connection stays open between two requests; longer than a proxy in "
        "front keeps it, mostly 60, else the proxy sends requests into closed connections",
    )
    strict: bool = Field(
        False,
        description="refuse requests with unknown fields; otherwise the header x-hypergen-ignored names them",
    )
    unknown_model: Literal["error", "first"] = Field(
        "error",
        description="with several models, what a request gets that names none of them: 404, or the first",
    )
    public_url: str | None = Field(
        None,
        pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$",
        description="address of this server in `url` results; absent: the address of the request",
    )
    max_side: int = Field(2048, ge=64, le=8192, description="longest width or height of an image, in pixels")
    max_steps: int = Field(150, ge=1, le=150, description="maximum number of denoising steps")
    max_megapixel_steps: float = Field(
        6300, gt=0, allow_inf_nan=False, description="maximum work per request: images x steps x megapixels"
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
        "Hyperbolic responses and hypergen_price_total in /metrics; absent: no prices",
    )
    playground: bool = Field(True, description="serve the playground, a web page for this API, at /")
    image_metadata: bool = Field(True, description="write prompt, seed and settings into image files")
    storage: str | None = Field(
        None,
        description="object storage for `url` results and the images of jobs: s3://BUCKET or "
        "s3://BUCKET/PREFIX (package obstore); credentials, region and endpoint are those of the AWS_... "
        "variables. Absent: a temporary folder",
    )
    storage_public_url: str | None = Field(
        None,
        description="address of the object storage in `url` results, where clients reach it by another one "
        "than AWS_ENDPOINT_URL, such as https://s3.example.com",
    )
    url_lifetime_s: float = Field(
        3600, ge=60, allow_inf_nan=False, description="seconds for which a `url` result can be fetched"
    )
    max_jobs: int = Field(1000, ge=1, description="jobs to keep, finished and unfinished")
    jobs: str | None = Field(
        None,
        repr=False,
        description="Redis or Valkey in which replicas share jobs and Idempotency-Key, such as "
        "redis://:password@host:6379/0, or rediss:// with TLS (extra `redis`); absent: memory of this server",
    )
    url_storage_mb: float = Field(
        1024,
        gt=0,
        allow_inf_nan=False,
        description="disk space for `url` results in the folder, in MB, and with --jobs also memory of Redis "
        "for the images of jobs; the oldest are removed first",
    )
    idempotency_mb: float = Field(
        256,
        ge=0,
        allow_inf_nan=False,
        description="memory for the answers that repeated requests with the same Idempotency-Key get, in MB; "
        "the oldest are dropped first; 0: a repeat only joins a running request",
    )

    @field_validator("ssl_keyfile")
    @classmethod
    def _check_certificate(cls, key: Path | None, info: ValidationInfo) -> Path | None:
        return _both_or_none(key, info.data.get("ssl_certfile"))

    @field_validator("jobs")
    @classmethod
    def _check_jobs(cls, url: str | None) -> str | None:
        if url is not None and not re.fullmatch(r"(redis|rediss|valkey|valkeys)://[^\s/?#]+(/\d*)?", url):
            raise ValueError("must be redis://HOST:PORT/DATABASE or rediss://HOST:PORT/DATABASE")
        return url

    @field_validator("storage")
    @classmethod
    def _check_storage(cls, storage: str | None) -> str | None:
        if storage is not None and not _STORAGE.fullmatch(storage):
            raise ValueError("must be s3://BUCKET or s3://BUCKET/PREFIX, such as s3://images/results")
        return storage and storage.rstrip("/")

    @field_validator("storage_public_url")
    @classmethod
    def _check_storage_url(cls, url: str | None, info: ValidationInfo) -> str | None:
        if url is not None and not re.fullmatch(r"https?://[^\s/?#@]+", url):
            raise ValueError("must be a scheme and a host, without a path, such as https://s3.example.com")
        if url is not None and info.data.get("storage") is None:
            raise ValueError("needs --storage")
        return url

    @field_validator("url_lifetime_s")
    @classmethod
    def _check_lifetime(cls, lifetime_s: float, info: ValidationInfo) -> float:
        if info.data.get("storage") is not None and lifetime_s > _MAX_PRESIGNED_S:
            raise ValueError(
                f"must be at most {_MAX_PRESIGNED_S} with --storage, the limit of presigned URLs"
            )
        return lifetime_s

    @field_validator("url_storage_mb")  # not called for the default
    @classmethod
    def _check_folder_size(cls, size: float, info: ValidationInfo) -> float:
        if info.data.get("storage") is not None and info.data.get("jobs") is None:
            raise ValueError("cannot be combined with --storage: a bucket's lifecycle rule bounds its size")
        return size

    @field_validator("allowed_host")
    @classmethod
    def _check_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            if not re.fullmatch(r"[A-Za-z0-9._-]{1,255}", host):
                raise ValueError("must be a name without scheme, port and path, such as images.example")
        return tuple(host.rstrip(".").lower() for host in hosts)

    @field_validator("cors_origin")
    @classmethod
    def _check_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(
                r"[a-z][a-z0-9+.-]{0,30}://[a-z0-9._:\[\]-]{1,260}", origin
            ):
                raise ValueError(
                    "must be * or a scheme and a host in lower case, without a path, such as https://app.example"
                )
        return origins

    @field_validator("trusted_proxy")
    @classmethod
    def _check_proxies(cls, proxies: tuple[str, ...]) -> tuple[str, ...]:
        for proxy in proxies:
            try:
                if proxy != "*":
                    ip_network(proxy)
            except ValueError:
                raise ValueError(
                    "must be * or an IP address or network, such as 127.0.0.1 or 10.0.0.0/8"
                ) from None
        return proxies

    @field_validator("allowed_host", "cors_origin", "trusted_proxy", mode="before")
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
        description="models to serve: hub id, folder, .safetensors checkpoint, model-store tag, served-model "
        "file or the fields of one; absent: the embedded model",
    )
    revision: str | None = Field(None, description="branch, tag or commit of a hub model")
    single_file_config: str | None = Field(
        None,
        description="folder, hub id or store tag with the configuration, vocabularies and missing components "
        "of a single-file checkpoint; absent: searched next to the file, in the store and on the hub",
    )
    served_model_name: str | None = Field(
        None, description="id of the model in /v1/models; absent: MODEL as given"
    )
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings.model_validate({}))
    queue: QueueSettings = Field(default_factory=lambda: QueueSettings.model_validate({}))
    server: ServerSettings = Field(default_factory=lambda: ServerSettings.model_validate({}))
