"""OpenTelemetry traces: a span for each stage of a request, within BentoML's span of the HTTP request.

BentoML's configuration turns them on, with its section `tracing`:
https://docs.bentoml.com/en/latest/build-with-bentoml/observability/tracing.html.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer

from hypergen import __version__
from hypergen.api.request_record import RequestRecord


def request_tracing() -> Callable[[RequestRecord], None] | None:
    """Adds the spans of a request that has ended to its trace; None if BentoML's tracing is off."""
    if not BentoMLContainer.tracing.exporter_type.get():
        return None
    from opentelemetry import trace

    @cache
    def tracer() -> trace.Tracer:
        # Not before the first request: the provider names the service, which BentoML knows after its start.
        return BentoMLContainer.tracer_provider.get().get_tracer("hypergen", __version__)

    def add_spans(record: RequestRecord) -> None:
        # BentoML's span, which has ended with the response.
        if not trace.get_current_span().get_span_context().trace_flags.sampled:
            return
        attributes = _attributes(record)
        monotonic_zero = time.time() - time.monotonic()
        for stage in record.times.stages():
            start = monotonic_zero + stage.started_at
            image = {} if stage.image is None else {"hypergen.image": stage.image}
            span = tracer().start_span(stage.name, start_time=_ns(start), attributes=attributes | image)
            span.end(_ns(start + stage.seconds))

    return add_spans


def _attributes(record: RequestRecord) -> dict[str, Any]:
    """Those of a request's spans; no prompt, and nothing about its key."""
    fields = {"request_id": record.request_id, "endpoint": record.path, "model": record.model}
    fields |= record.generation | {"repeat_of": record.repeat_of}
    return {f"hypergen.{name}": value for name, value in fields.items() if value is not None}


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
