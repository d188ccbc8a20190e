"""The section `server`: addresses, authentication, limits and results."""

from __future__ import annotations

import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from .values import LogFormat, LogLevel, both_or_none

# A bucket, and a prefix of characters that need no escaping in URLs; none of its parts begins with a dot.
_STORAGE = re.compile(r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](?!.*/[/.])(/[A-Za-z0-9_./-]*)?")
_MAX_PRESIGNED_S = 7 * 24 * 3600


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
        return both_or_none(key, info.data.get("ssl_certfile"))

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
