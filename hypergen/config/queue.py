"""The section `queue`: limits of the request queue and of the overflow queue."""

from pydantic import BaseModel, Field


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
