"""Response schemas that all dialects share, for /openapi.json.

Responses are not validated against them, because those with images are megabytes and written in pieces.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from hypergen.api.errors import envelope

_Seconds = Field(description="Unix time in seconds")


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
    defaults: dict[str, str | float | None] = Field(description="request field -> its value if absent")
    max_loras: int


class Health(BaseModel):
    status: Literal["healthy", "loading", "recovering", "draining", "failed"]
    # The rest is absent from a response to a request without a valid key, if the server has keys.
    version: str | None = None
    uptime_s: int | None = None
    model: str | None = Field(None, description="the first of the models")
    models: list[ServedModelHealth] | None = None
    device: str | None = None
    queue_size: int | None = Field(None, description="unfinished requests")
    limits: dict[str, float] | None = Field(None, description="of a request, under the names of the settings")


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
    position: int | None = Field(None, description="number of requests before it in the queue")
    progress: JobProgress | None = None
    expected_s: float | None = Field(None, description="estimated seconds until the end")
    result: dict[str, object] | None = Field(None, description="the response of the request's own route")
    error: JobError | None = None


class BatchImage(BaseModel):
    b64_json: str = Field(description="image file, base64")
    seed: int = Field(description="seed of this image")


class BatchResult(BaseModel):
    """The result of one item of BentoML's batchable API: images, or the error of the OpenAI route."""

    status: int = Field(description="HTTP status of the item")
    images: list[BatchImage]
    error: ErrorDetail | None = None


SCHEMAS: tuple[type[BaseModel], ...] = (ErrorResponse, Model, ModelList, Health, ImageJob, BatchResult)
