"""OpenTelemetry traces of a real server, which a collector in this process receives."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from hypergen.bentoml_integration.tracing import request_tracing
from tests.support.http_client import GENERATIONS, client_of
from tests.support.live_server import LiveServer, start_server

BODY: dict[str, Any] = {"prompt": "a private prompt", "num_inference_steps": 3, "n": 2, "size": "64x64"}
KEY = "sk-traced-key"
JOBS = "/v1/images/jobs"
CLOCKS_NS = 10_000_000
STAGES = ["decode", "decode", "denoise", "encode", "queue", "write", "write"]


class Collector:
    """Receives spans by OTLP over HTTP."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.spans: list[Span] = []

    def wait_for(self, trace_id: str) -> tuple[Span, list[Span]]:
        """The span of this trace's HTTP request, and those of its stages."""
        until = time.monotonic() + 60
        while time.monotonic() < until:
            spans = [span for span in list(self.spans) if span.trace_id.hex() == trace_id]
            stages = [span for span in spans if span.name in STAGES]
            http = [span for span in spans if span.kind == Span.SPAN_KIND_SERVER]
            if http and len(stages) >= len(STAGES):
                return http[0], stages
            time.sleep(0.05)
        raise AssertionError([span.name for span in self.spans])


@contextmanager
def start_collector() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
                for scope in resource.scope_spans:
                    collector.spans.extend(scope.spans)
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        collector = Collector(f"http://127.0.0.1:{server.server_port}/v1/traces")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield collector
        finally:
            server.shutdown()


@pytest.fixture(scope="module")
def traced(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: Path
) -> Iterator[tuple[LiveServer, Collector]]:
    folder = tmp_path_factory.mktemp("traced")
    with start_collector() as collector:
        configuration = folder / "bentoml.yaml"
        configuration.write_text(
            "services:\n"
            "  tracing:\n"
            "    exporter_type: otlp\n"
            "    sample_rate: 1.0\n"
            "    excluded_urls: [livez, readyz, health, metrics]\n"
            f"    otlp: {{protocol: http, endpoint: '{collector.url}'}}\n"
        )
        environment = {"BENTOML_CONFIG": str(configuration), "OTEL_BSP_SCHEDULE_DELAY": "100"}
        arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32")
        with start_server(folder / "server", *arguments, environment=environment, api_key=KEY) as server:
            yield server, collector


def generate(
    server: LiveServer, path: str = GENERATIONS, flags: str = "01", **fields: Any
) -> tuple[str, str, httpx.Response]:
    """Send a request in a trace; returns the ids of the trace and of the client's span."""
    trace_id, parent_id = secrets.token_hex(16), secrets.token_hex(8)
    with client_of(server, traceparent=f"00-{trace_id}-{parent_id}-{flags}") as client:
        return trace_id, parent_id, client.post(path, json={**BODY, **fields})


@pytest.mark.parametrize(("path", "fields"), [(GENERATIONS, {}), (GENERATIONS, {"stream": True}), (JOBS, {})])
def test_a_trace_has_a_span_for_each_stage(
    traced: tuple[LiveServer, Collector], path: str, fields: dict[str, Any]
) -> None:
    server, collector = traced
    trace_id, parent_id, response = generate(server, path, **fields)
    assert response.status_code == (202 if path == JOBS else 200)
    http, stages = collector.wait_for(trace_id)
    assert http.parent_span_id.hex() == parent_id
    assert {span.parent_span_id for span in stages} == {http.span_id}
    assert sorted(span.name for span in stages) == STAGES
    ends = {span.name: span.end_time_unix_nano for span in stages}
    assert ends["queue"] <= ends["encode"] <= ends["denoise"] <= ends["write"]
    for span in stages:
        assert span.start_time_unix_nano <= span.end_time_unix_nano
        # Wall time and durations have clocks of their own.
        assert http.start_time_unix_nano - CLOCKS_NS <= span.start_time_unix_nano
        assert path == JOBS or span.end_time_unix_nano <= http.end_time_unix_nano + CLOCKS_NS
        attributes = {entry.key: entry.value for entry in span.attributes}
        assert attributes["hypergen.model"].string_value == response.headers["x-hypergen-model"]
        assert attributes["hypergen.request_id"].string_value == response.headers["x-request-id"]
        assert attributes["hypergen.endpoint"].string_value == path
        assert attributes["hypergen.size"].string_value == "64x64"
        assert (attributes["hypergen.n"].int_value, attributes["hypergen.steps"].int_value) == (2, 3)
        assert ("hypergen.image" in attributes) == (span.name in ("decode", "write"))


def test_only_sampled_and_accepted_requests_have_stages_and_no_span_has_secrets(
    traced: tuple[LiveServer, Collector],
) -> None:
    server, collector = traced
    unsampled, _, _ = generate(server, flags="00")
    refused, _, response = generate(server, n=11)
    assert response.status_code == 400
    last, _, _ = generate(server)
    collector.wait_for(last)  # spans arrive in the order of their ends
    by_trace = {(span.trace_id.hex(), span.name) for span in collector.spans}
    assert not [name for trace_id, name in by_trace if trace_id == unsampled]
    assert [name for trace_id, name in by_trace if trace_id == refused]
    assert not [name for trace_id, name in by_trace if trace_id == refused and name in STAGES]
    assert not [name for _, name in by_trace if "health" in name]
    sent = b"".join(span.SerializeToString() for span in collector.spans)
    assert b"private" not in sent
    assert KEY.encode() not in sent


def test_without_bentomls_setting_nothing_is_traced() -> None:
    assert request_tracing() is None
