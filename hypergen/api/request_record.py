"""What is known about one HTTP request: its line in the log, and its metrics."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import quote

from starlette.types import Scope

from hypergen import metrics
from hypergen.api.auth import OPEN_PATHS
from hypergen.api.dialects.endpoints import ENDPOINTS
from hypergen.api.errors import CLIENT_CLOSED_REQUEST, error_body, status_of
from hypergen.errors import GenerationError, RequestError
from hypergen.request import ANONYMOUS, ApiKey, GenerationRequest
from hypergen.request_times import RequestTimes

logger = logging.getLogger(__name__)

_IMAGE_PATHS = frozenset(endpoint.path for endpoint in ENDPOINTS)


@dataclass(eq=False)
class RequestRecord:
    """One HTTP request. Handlers fill in what they learn; `finish` writes it.

    Attributes:
        client: address of the client.
        api_key: the key of the request.
        outcome_status: instead of `status` for the outcome: a response may fail after its status 200.
        error: code and param of a refusal or failure.
        generation: fields of a validated request for images, for the log.
        repeat_of: id of the request whose answer it got, because it has the same idempotency key.
        times: of its images; `observe` of it gets the request's events.
        trace: adds the stages to the request's trace; None: tracing is off.
    """

    request_id: str
    method: str
    path: str
    client: str | None
    arrived_at: float = field(default_factory=time.monotonic)
    api_key: ApiKey = ANONYMOUS
    status: int = 0
    outcome_status: int | None = None
    error: dict[str, str] = field(default_factory=dict[str, str])
    model: str | None = None
    generation: dict[str, Any] = field(default_factory=dict[str, Any])
    repeat_of: str | None = None
    times: RequestTimes = field(default_factory=RequestTimes)
    trace: Callable[[RequestRecord], None] | None = None

    @classmethod
    def of(
        cls, scope: Scope, request_id: str, trace: Callable[[RequestRecord], None] | None = None
    ) -> RequestRecord:
        client = scope.get("client")
        return cls(request_id, scope["method"], scope["path"], client[0] if client else None, trace=trace)

    def of_job(self) -> RequestRecord:
        """The record of the job that the request creates: the same, with times of its own."""
        return replace(self, times=RequestTimes())

    def set_generation(self, request: GenerationRequest) -> None:
        """Keep what log and traces say about a request; its prompt and images are not in it."""
        self.times.submitted_at = time.monotonic()  # until now it was read and validated
        self.model = request.model
        self.generation = {
            "n": request.n,
            "size": f"{request.width}x{request.height}",
            "steps": request.num_inference_steps,
        }

    def repeat(self, model: str | None, request_id: str) -> None:
        """The request got the answer of another one, by its idempotency key."""
        self.model, self.repeat_of = model, request_id

    def fail(self, error: Exception) -> None:
        """The request failed after the start of its response."""
        if not isinstance(error, RequestError):
            error = GenerationError("The server failed on this request; see its log.")
        self.outcome_status = status_of(error)
        self.set_error(error_body(error)["error"])

    def disconnect(self) -> None:
        """The client disconnected during the response."""
        self.outcome_status = self.outcome_status or CLIENT_CLOSED_REQUEST

    def set_error(self, error: dict[str, Any]) -> None:
        self.error = {name: str(error[name])[:100] for name in ("code", "param") if error.get(name)}

    def end_trace(self) -> None:
        if self.trace is not None:
            self.trace(self)

    def finish(self) -> None:
        """Write the line, count a request for images, and add its stages to its trace."""
        self.end_trace()
        seconds = time.monotonic() - self.arrived_at
        status = self.outcome_status or self.status
        is_probe = self.path in OPEN_PATHS
        if self.path in _IMAGE_PATHS and self.method == "POST":
            metrics.record_request(self.path, self.model, self.api_key.name, self._outcome(), seconds)
        if status in (429, 503) and not is_probe:
            metrics.record_rejection(self.error.get("code", "unavailable"))
        fields = {name: value for name, value in self._fields(seconds).items() if value is not None}
        level = logging.DEBUG if is_probe else logging.INFO  # probes come every few seconds
        # Encoded, because a space in the path could forge a field.
        path = quote(self.path, safe="/:@!$&'()*+,;=~", errors="replace")[:200]
        line = {"method": self.method, "path": path, "status": self.status}
        logger.log(level, "%(method)s %(path)s %(status)d", line, extra={"fields": fields})

    def _outcome(self) -> str:
        status = self.outcome_status or self.status
        return "repeated" if self.repeat_of and status < 400 else metrics.outcome_of(status)

    def _fields(self, seconds: float) -> dict[str, Any]:
        times = self.times
        write_s = max((image.write_s for image in times.images), default=None)
        return {
            "ms": _milliseconds(seconds),
            "request_id": self.request_id,
            "key": None if self.api_key is ANONYMOUS else self.api_key.name,
            "model": self.model,
            **self.generation,
            "images_per_forward": None if (mean := times.images_per_forward) is None else round(mean, 2),
            "queue_ms": _milliseconds(times.queue_s),
            "encode_ms": _milliseconds(times.encode_s if times.started_at else None),
            "denoise_ms": _milliseconds(times.denoise_s),
            "write_ms": _milliseconds(write_s),
            "repeat_of": self.repeat_of,
            "outcome": self._outcome() if self.outcome_status not in (None, self.status) else None,
            **{f"error_{name}": value for name, value in self.error.items()},
            "client": self.client,
        }


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else round(seconds * 1000)
