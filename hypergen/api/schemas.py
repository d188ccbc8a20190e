"""The answers that all dialects share, as models from which /openapi.json is made.

Answers are not checked against them: those with images are megabytes, and are written in pieces.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hypergen.api.errors import envelope

_Seconds = Field(description="seconds since 1970")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(BaseModel):
    model_config = ConfigDict(
        json_schema_extra={
            "example": envelope(400, "'n' should be less than or equal to 10.", "n", "invalid_value")
        }
    )
    error: ErrorDetail
    detail: str = Field(description="the message again")


class Model(BaseModel):
    id: str
    object: Literal["model"]
    created: int = _Seconds
    owned_by: str


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[Model]


class ServedModelHealth(BaseModel):
    id: str
    aliases: list[str]
    in_memory: bool


class Health(BaseModel):
    status: Literal["healthy", "loading", "recovering", "draining", "failed"]
    model: str = Field(description="the first of the models")
    models: list[ServedModelHealth]
    device: str
    queue_size: int = Field(description="requests accepted and unfinished")


class JobProgress(BaseModel):
    step: int
    steps: int


class JobError(ErrorDetail):
    status: int


class ImageJob(BaseModel):
    id: str
    object: Literal["image.job"]
    status: Literal["queued", "running", "succeeded", "failed", "cancelled"]
    created: int = _Seconds
    position: int | None = Field(None, description="waiting requests that came before")
    progress: JobProgress | None = None
    expected_s: float | None = Field(None, description="seconds until it is done, estimated")
    result: dict[str, object] | None = Field(None, description="what the request's own route would answer")
    error: JobError | None = None


class BatchImage(BaseModel):
    b64_json: str
    seed: int


class BatchResult(BaseModel):
    """What became of one item of BentoML's batchable API."""

    status: int = Field(description="the status that the item alone would have")
    images: list[BatchImage]
    error: ErrorDetail | None = None


SCHEMAS: tuple[type[BaseModel], ...] = (ErrorResponse, Model, ModelList, Health, ImageJob, BatchResult)
