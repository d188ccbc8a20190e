"""The interface of a job store, and what stores have in common.

Jobs are image requests whose result is fetched later, for work beyond a proxy's timeout.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from hypergen.api.dialects.endpoint import Endpoint
from hypergen.api.errors import error_body, status_of
from hypergen.api.request_record import RequestRecord
from hypergen.api.validated_request import ValidatedRequest
from hypergen.errors import RequestError
from hypergen.metrics import outcome_of, record_request
from hypergen.request import ANONYMOUS, GenerationRequest

logger = logging.getLogger("hypergen.api.jobs")

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]


@dataclass(frozen=True, kw_only=True)
class JobStatus:
    """A job at one moment.

    Attributes:
        created: Unix time in seconds.
        validated: without input images once the job has ended.
        position: number of jobs before it; None unless it waits.
        expected_s: estimated seconds until its end.
    """

    id: str
    state: JobState
    created: int
    validated: ValidatedRequest
    position: int | None = None
    step: int = 0
    steps: int | None = None
    expected_s: float | None = None
    error: RequestError | None = None

    def body(self) -> dict[str, Any]:
        """The body for the client, without the result."""
        body: dict[str, Any] = {
            "id": self.id,
            "object": "image.job",
            "status": self.state,
            "created": self.created,
        }
        if self.position is not None:
            body["position"] = self.position
        if self.steps is not None:
            body["progress"] = {"step": self.step, "steps": self.steps}
        if self.expected_s is not None:
            body["expected_s"] = round(self.expected_s, 1)
        if self.error is not None:
            body["error"] = {**error_body(self.error)["error"], "status": status_of(self.error)}
        return body


class JobStore(Protocol):
    """The jobs of a server, or of all servers that share a store. Belongs to one event loop."""

    async def start(self) -> None:
        """Begin to run jobs."""
        ...

    async def close(self) -> None:
        """Stop running jobs."""
        ...

    async def submit(
        self, endpoint: Endpoint, validated: ValidatedRequest, record: RequestRecord, deadline: float
    ) -> JobStatus:
        """Create a job.

        Args:
            record: of the request that creates it.
            deadline: time of the event loop's clock.

        Raises:
            QueueFullError: too many unfinished jobs, or the queue or a limit of the API key is full.
            UnavailableError: the store or the engine is away.
        """
        ...

    async def get(self, job_id: str) -> JobStatus:
        """
        Raises:
            NotFoundError: the job is unknown or has expired.
            UnavailableError: the store is away.
        """
        ...

    async def cancel(self, job_id: str) -> JobStatus:
        """Cancel a job at the next step; no effect if it has ended. Raises as `get`."""
        ...

    async def result(self, job: JobStatus, base: str | None) -> list[bytes]:
        """The response of the request's own route, as pieces of JSON.

        Args:
            job: which succeeded.
            base: the URL before a stored image's name; None: without `url`.

        Raises:
            NotFoundError: the images have expired, or newer ones replaced them.
            UnavailableError: the store is away.
        """
        ...


def report_end(
    job_id: str, request: GenerationRequest, state: JobState, error: RequestError | None, seconds: float
) -> None:
    """Count the end of a job and log it.

    Args:
        seconds: since the job was created.
    """
    outcome = "cancelled" if state == "cancelled" else outcome_of(status_of(error) if error else 200)
    record_request("job", request.model, request.api_key.name, outcome, seconds)
    fields: dict[str, Any] = {"ms": round(seconds * 1000), "model": request.model}
    if request.api_key is not ANONYMOUS:
        fields["key"] = request.api_key.name
    if error is not None:
        fields["error_code"] = error.code
    logger.info("Job %s %s", job_id, state, extra={"fields": fields})
