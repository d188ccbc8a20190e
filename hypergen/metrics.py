"""HyperGen's metrics in Prometheus' format; BentoML serves them at /metrics together with its own.

Labels have no values that a client can choose freely, so that no request adds series. Engines report to the
HTTP process, which has all metrics.

Names and units: https://prometheus.io/docs/practices/naming/.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence

from prometheus_client import Counter, Gauge, Histogram

from hypergen import __version__
from hypergen.events import EngineStatus, ForwardPass, ServerStatus
from hypergen.request_times import RequestTimes

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
_SECONDS_OF_STEPS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)
_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256, 512)
_STATES = ("loading", "ready", "recovering", "failed", "draining")


def _gauge(name: str, description: str, labels: Sequence[str] = ()) -> Gauge:
    # BentoML's metrics are in multi-process mode; this process is the only one with these.
    return Gauge(f"hypergen_{name}", description, labels, multiprocess_mode="mostrecent")


def _counter(name: str, description: str, labels: Sequence[str] = ()) -> Counter:
    return Counter(f"hypergen_{name}", description, labels)


def _histogram(name: str, description: str, labels: Sequence[str], buckets: Sequence[float]) -> Histogram:
    return Histogram(f"hypergen_{name}", description, labels, buckets=buckets)


_REQUESTS = _counter(
    "requests", "requests for images; a job counts when it ends", ["model", "endpoint", "outcome"]
)
_KEY_REQUESTS = _counter("key_requests", "requests for images, by API key", ["key", "outcome"])
_KEY_IMAGES = _counter("key_images", "finished images, by API key", ["key"])
_REQUEST_SECONDS = _histogram(
    "request_seconds", "duration of requests for images", ["endpoint", "outcome"], _SECONDS
)
_REJECTED = _counter("rejected", "requests answered 429 or 503, by the code of the error", ["reason"])
_PRICE = _counter("price", "price of generated images, in the currency of --price-rate", ["model"])
_IMAGES = _counter("images", "finished images", ["model"])
_STEPS = _counter("denoising_steps", "denoising steps, summed over images", ["model"])
_STAGE_SECONDS = _histogram(
    "stage_seconds",
    "time of each stage: queue, encode (prompts) and denoise of requests, decode and write of images",
    ["model", "stage"],
    _SECONDS,
)
_STEP_SECONDS = _histogram("step_seconds", "duration of forward passes", ["model"], _SECONDS_OF_STEPS)
_BATCH_IMAGES = _histogram("batch_images", "images per forward pass", ["model"], _COUNTS)
_BATCH_ROWS = _histogram(
    "batch_rows", "rows per forward pass, two for a guided image, with padding", ["model"], _COUNTS
)
_RUNNING = _gauge("queue_running", "running requests")
_WAITING = _gauge("queue_waiting", "requests that wait in the request queue")
_OVERFLOW = _gauge("queue_overflow", "requests that wait in the overflow queue")
_SHARED_WAITING = _gauge(
    "shared_jobs_waiting", "jobs that wait in Redis; all replicas report the same number"
)
_STATE = _gauge("state", "1 for the state of the server, 0 for the others", ["state"])
_UP = _gauge("engine_up", "1 if the engine is ready", ["engine"])
_ENGINE_REQUESTS = _gauge("engine_requests", "unfinished requests that an engine has", ["engine"])
_RESTARTS = _counter("engine_restarts", "restarts of engine processes", ["engine"])
_MODELS = _gauge("models_in_memory", "models in memory", ["engine"])
_LOAD_SECONDS = _gauge("model_load_seconds", "duration of the latest load of a model", ["engine", "model"])
_MEMORY = _gauge(
    "device_memory_bytes",
    "memory of an engine: resident of its process; allocated, reserved and total of its GPU",
    ["engine", "kind"],
)
_HITS = _counter("cache_hits", "lookups that found an entry in a cache of an engine", ["engine", "cache"])
_MISSES = _counter("cache_misses", "lookups that found no entry", ["engine", "cache"])
_LORAS = _gauge("lora_loaded", "LoRAs in memory", ["engine"])
_INVARIANT = _gauge(
    "batch_invariant", "image sizes by the probe's verdict: exact, or close", ["engine", "verdict"]
)
_BUILD = _gauge("build_info", "1; version of HyperGen and Python", ["version", "python"])

_OUTCOMES = {
    400: "invalid",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    429: "rejected",
    499: "cancelled",
    503: "unavailable",
    504: "timeout",
}


def outcome_of(status: int) -> str:
    """The outcome of a request with this HTTP status."""
    default = "ok" if status < 400 else "invalid" if status < 500 else "failed"
    return _OUTCOMES.get(status, default)


def record_request(endpoint: str, model: str | None, api_key: str, outcome: str, seconds: float) -> None:
    """Count a request for images.

    Args:
        endpoint: its path, or "job" for the end of a job.
        model: id; None: the request ended before its model was known.
        api_key: name of the key; without keys, and without a valid key, "anonymous".
    """
    _REQUESTS.labels(model or "", endpoint, outcome).inc()
    _KEY_REQUESTS.labels(api_key, outcome).inc()
    _REQUEST_SECONDS.labels(endpoint, outcome).observe(seconds)


def record_rejection(reason: str) -> None:
    """Count a request that was answered 429 or 503.

    Args:
        reason: the code of the error.
    """
    _REJECTED.labels(reason).inc()


def record_shared_jobs(waiting: int) -> None:
    """Set the number of jobs that wait in Redis."""
    _SHARED_WAITING.set(waiting)


def record_forward(forward: ForwardPass) -> None:
    """Count one forward pass of an engine."""
    _STEPS.labels(forward.model).inc(forward.images)
    _STEP_SECONDS.labels(forward.model).observe(forward.seconds)
    _BATCH_IMAGES.labels(forward.model).observe(forward.images)
    _BATCH_ROWS.labels(forward.model).observe(forward.rows)


def record_generation(model: str, api_key: str, times: RequestTimes, price: float | None) -> None:
    """Count the images of a finished request, and the time of its stages."""
    for stage in times.stages():
        _STAGE_SECONDS.labels(model, stage.name).observe(stage.seconds)
    _IMAGES.labels(model).inc(len(times.images))
    _KEY_IMAGES.labels(api_key).inc(len(times.images))
    if price is not None:
        _PRICE.labels(model).inc(price)


class StatusMetrics:
    """The metrics that follow from the server's status: gauges, and counters of the engines."""

    def __init__(self) -> None:
        self._counted: dict[tuple[Counter, tuple[str, ...], int], int] = {}
        _BUILD.labels(__version__, platform.python_version()).set(1)
        _SHARED_WAITING.set(0)

    def update(self, status: ServerStatus) -> None:
        _RUNNING.set(status.running)
        _WAITING.set(status.waiting)
        _OVERFLOW.set(status.overflow)
        for state in _STATES:
            _STATE.labels(state).set(state == status.state)
        for number, engine in enumerate(status.engines):
            self._update_engine(str(number), engine)

    def _update_engine(self, number: str, engine: EngineStatus) -> None:
        _UP.labels(number).set(engine.state == "ready")
        _ENGINE_REQUESTS.labels(number).set(engine.requests)
        _MODELS.labels(number).set(len(engine.models))
        _LORAS.labels(number).set(engine.loras)
        for model, seconds in engine.load_s.items():
            _LOAD_SECONDS.labels(number, model).set(seconds)
        for kind, size in engine.memory_bytes.items():
            _MEMORY.labels(number, kind).set(size)
        verdicts = list(engine.determinism.values())
        for verdict in ("exact", "close"):
            _INVARIANT.labels(number, verdict).set(verdicts.count(verdict))
        self._count(_RESTARTS, (number,), engine.restarts)
        for cache, (hits, misses) in engine.cache_lookups.items():
            self._count(_HITS, (number, cache), hits, engine.restarts)
            self._count(_MISSES, (number, cache), misses, engine.restarts)

    def _count(self, counter: Counter, labels: tuple[str, ...], total: int, process: int = 0) -> None:
        """Add what was counted since the last update; each engine process counts from 0."""
        key = counter, labels, process
        counter.labels(*labels).inc(total - self._counted.get(key, 0))
        self._counted[key] = total
