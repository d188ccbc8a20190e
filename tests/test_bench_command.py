"""`hypergen bench URL`: requests, measurements and reports."""

from __future__ import annotations

import asyncio
import io
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from rich.console import Console

from hypergen.cli import bench
from hypergen.cli.main import main
from hypergen.errors import ConfigurationError
from tests.support.live_server import LiveServer, free_port


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments], catch_exceptions=False)


def finished(latency_s: float, error: str | None = None, **body: object) -> bench.Result:
    images, message = (0, "of the server") if error else (1, None)
    return bench.Result(1.0, 1.0, 1.0 + latency_s, latency_s, body, images, error, message)


@contextmanager
def barrier_server(barrier: Barrier) -> Iterator[str]:
    """A server that responds only after the barrier's number of requests has arrived."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            try:
                barrier.wait(60)
            except BrokenBarrierError:
                return
            body = b'{"data": [{"url": "http://x/1.png"}, {"url": "http://x/2.png"}]}'
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        barrier.abort()
        server.shutdown()
        thread.join()


def test_arrivals_have_the_rate_and_depend_only_on_the_seed() -> None:
    planned = bench.plan_requests(rate=4, requests=4001, seed=1, prompts=["a"])
    times = [request.arrival_s for request in planned]
    assert times[0] == 0
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(1 / 4, rel=0.05)
    mixed = bench.plan_requests(rate=4, requests=4001, seed=1, prompts=["a"], sizes=["1x1", "2x2"], steps=[3])
    assert [request.arrival_s for request in mixed] == times
    assert mixed == bench.plan_requests(
        rate=4, requests=4001, seed=1, prompts=["a"], sizes=["1x1", "2x2"], steps=[3]
    )
    assert times != [r.arrival_s for r in bench.plan_requests(rate=4, requests=4001, seed=2, prompts=["a"])]


def test_only_fields_with_values_are_sent() -> None:
    (plain,) = bench.plan_requests(rate=1, requests=1, seed=7, prompts=["a"])
    assert plain.body == {"prompt": "a"}
    planned = bench.plan_requests(
        rate=float("inf"),
        requests=50,
        seed=7,
        prompts=["a", "b"],
        sizes=["64x64", "128x128"],
        steps=[2, 3],
        model="m",
        seed_requests=True,
    )
    assert {request.arrival_s for request in planned} == {0.0}
    assert [request.body["seed"] for request in planned] == list(range(7, 57))
    mix = {(r.body["prompt"], r.body["size"], r.body["num_inference_steps"]) for r in planned}
    assert len(mix) == 8
    assert {request.body["model"] for request in planned} == {"m"}


def test_percentiles_of_known_latencies() -> None:
    results = [finished(float(latency)) for latency in range(101)]
    results.append(finished(1000, "HTTP 400"))
    summary = bench.summarize(results)
    assert [summary[f"{name}_s"] for name in ("mean", "p50", "p95", "p99", "max")] == [50, 50, 95, 99, 100]
    assert (summary["finished"], summary["failed"], summary["errors"]) == (102, 1, {"HTTP 400": 1})
    assert summary["duration_s"] == 1001
    assert summary["images_per_s"] == summary["requests_per_s"] == 101 / 1001
    # Between two values, linearly.
    assert bench.summarize([finished(1), finished(3)])["p95_s"] == pytest.approx(2.9)
    assert bench.summarize([])["p50_s"] is None


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/images/generations"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/v1/images/generations"),
        ("https://api.example.com/v1/", "https://api.example.com/v1/images/generations"),
        ("https://example.com/openai/v1", "https://example.com/openai/v1/images/generations"),
    ],
)
def test_the_endpoint_of_an_address_or_a_base_url(url: str, endpoint: str) -> None:
    assert bench.endpoint_of(url) == endpoint


@pytest.mark.parametrize(
    "arguments",
    [
        ["127.0.0.1:8000"],
        ["http://"],
        ["http://x", "--rate", "0"],
        ["http://x", "--rate", "nan"],
        ["http://x", "--timeout", "-1"],
        ["http://x", "--prompt", "a", "--prompts", __file__],
    ],
)
def test_invalid_arguments_are_rejected(arguments: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        run(*arguments)
    assert run("http://x", "--steps", "20,many").exit_code == 2


def test_a_plot_without_matplotlib_is_rejected_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigurationError, match="plot needs the package matplotlib: pip"):
        run("http://x", "--plot", "a.png")


def test_a_server_is_measured(server: LiveServer, tmp_path: Path) -> None:
    file, plot = tmp_path / "new" / "bench.json", tmp_path / "new" / "bench.png"
    mix = ("--sizes", "64x64,64x72", "--steps", "2,3", "--seed-requests")
    result = run(
        server.url, "--rate", "20", "--requests", "12", *mix, "--json", str(file), "--plot", str(plot)
    )
    assert result.exit_code == 0, result.output
    report = json.loads(file.read_text(encoding="utf-8"))
    summary = report["summary"]
    assert (summary["finished"], summary["failed"], summary["errors"]) == (12, 0, {})
    assert len(report["results"]) == 12
    assert all(r["images"] == 1 and r["latency_s"] > 0 and r["error"] is None for r in report["results"])
    assert 0 < summary["p50_s"] <= summary["p95_s"] <= summary["p99_s"] <= summary["max_s"]
    assert summary["images_per_s"] == pytest.approx(12 / summary["duration_s"])
    for text in ("64x64, 2 steps", "64x72, 3 steps", "all", f"{summary['p95_s']:.3f}", "images/s"):
        assert text in result.stdout
    with Image.open(plot) as image:
        assert image.format == "PNG"


def test_errors_are_counted_by_class_and_a_partial_failure_exits_with_0(server: LiveServer) -> None:
    mix = ("--sizes", "64x64,65x64", "--steps", "2", "--seed", "3")
    result = run(server.url, "--rate", "inf", "--requests", "12", *mix)
    assert result.exit_code == 0, result.output
    (error,) = [line for line in result.stdout.splitlines() if line.startswith("Error: ")]
    assert error.startswith("Error: HTTP 400 (")
    assert "size" in error


def test_the_exit_code_is_1_if_every_request_failed(
    server: LiveServer, keyed_server: LiveServer, tmp_path: Path
) -> None:
    url, file = f"http://127.0.0.1:{free_port()}", tmp_path / "bench.json"
    result = run(url, "--rate", "inf", "--requests", "3", "--json", str(file))
    assert result.exit_code == 1
    assert "Error: ConnectError (3 of 3)" in result.stdout
    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["rate"] == "inf"
    assert report["summary"]["p99_s"] is None
    result = run(f"{server.url}/v2", "--requests", "1")
    assert result.exit_code == 1
    assert "Error: HTTP 404 (1 of 1)" in result.stdout
    few = ("--requests", "1", "--sizes", "64x64", "--steps", "2")
    assert "Error: HTTP 401 (1 of 1)" in run(keyed_server.url, *few, "--api-key", "wrong").stdout
    assert run(keyed_server.url, *few, "--api-key", "sk-right-key").exit_code == 0


def test_every_request_is_sent_without_waiting_for_others(tmp_path: Path) -> None:
    # More than the connections that httpx opens by default.
    with barrier_server(Barrier(120)) as url:
        file = tmp_path / "bench.json"
        result = run(url, "--rate", "inf", "--requests", "120", "--json", str(file))
    assert result.exit_code == 0, result.output
    summary = json.loads(file.read_text(encoding="utf-8"))["summary"]
    assert summary["images_per_s"] == pytest.approx(2 * summary["requests_per_s"])


def test_a_request_that_takes_too_long_is_a_timeout() -> None:
    with barrier_server(Barrier(2)) as url:
        result = run(url, "--requests", "1", "--timeout", "0.2")
    assert result.exit_code == 1
    assert "Error: timeout (1 of 1), the first: no response within 0.2 s" in result.stdout


async def test_latency_counts_from_the_planned_arrival() -> None:
    results: list[bench.Result] = []
    planned = [bench.PlannedRequest(0.0, {"prompt": "a"})]
    with barrier_server(Barrier(1)) as url:
        endpoint = bench.endpoint_of(url)
        sending = asyncio.create_task(bench.send_requests(endpoint, None, planned, 30, results.append))
        await asyncio.sleep(0)
        time.sleep(0.5)  # noqa: ASYNC251  a client that falls behind
        await sending
    assert results[0].sent_s > 0.4
    assert results[0].latency_s == results[0].finished_s > results[0].sent_s


def test_ctrl_c_prints_what_was_measured(tmp_path: Path) -> None:
    # SIGINT may be ignored in the test's own process, and children inherit that.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from hypergen.cli.main import run; run()"
    )
    file = tmp_path / "bench.json"
    barrier = Barrier(2)
    with barrier_server(barrier) as url:
        command = [sys.executable, "-c", code, "bench", url, "--rate", "0.001", "--json", str(file)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        barrier.wait(60)  # the first request has come; the second is planned for much later
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Throughput: " in output
    assert errors.strip() == "Interrupted: 1 of 100 requests finished."
    assert len(json.loads(file.read_text(encoding="utf-8"))["results"]) == 1


def test_control_characters_of_the_server_are_not_printed() -> None:
    written = io.StringIO()
    result = bench.Result(0, 0, 1, 1, {}, 0, "HTTP 500", "[red]\x1b[31mno\nimage")
    bench.print_results([result], Console(file=written, markup=False, highlight=False))
    assert "the first: [red] [31mno image" in written.getvalue()
