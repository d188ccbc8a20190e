"""`hypergen bench URL`: an open-loop load generator for any server with OpenAI's images API.

Open loop: a request is sent at its planned time, even if earlier ones are unfinished. Latency counts from
that time, not from the send, so that a slow client hides no delay ("coordinated omission", Gil Tene, 2013).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from hypergen.errors import ConfigurationError

PERCENTILES = (50, 95, 99)


@dataclass(frozen=True)
class PlannedRequest:
    """A request body and the time of its arrival, in seconds since the start of the run."""

    arrival_s: float
    body: dict[str, Any]


@dataclass(frozen=True)
class Result:
    """A finished request; all times except the latency are seconds since the start of the run."""

    arrival_s: float
    sent_s: float
    finished_s: float
    latency_s: float
    body: dict[str, Any]
    images: int
    error: str | None
    message: str | None


def plan_requests(
    *,
    rate: float,
    requests: int,
    seed: int,
    prompts: Sequence[str],
    sizes: Sequence[str] = (),
    steps: Sequence[int] = (),
    model: str | None = None,
    seed_requests: bool = False,
) -> list[PlannedRequest]:
    """Poisson arrivals at a mean rate, each with a random prompt, size and number of steps.

    A field without values is not sent, so that other servers get only fields that they support.

    Args:
        rate: requests per second; infinity sends all at once.
    """
    generator = random.Random(seed)
    # All arrivals first, so that they are the same for every mix.
    gaps = [generator.expovariate(rate) for _ in range(requests - 1)]
    planned: list[PlannedRequest] = []
    for index, arrival_s in enumerate(accumulate(gaps, initial=0.0)):
        body = {
            "prompt": generator.choice(prompts),
            "model": model,
            "size": generator.choice(sizes) if sizes else None,
            "num_inference_steps": generator.choice(steps) if steps else None,
            "seed": seed + index if seed_requests else None,
        }
        sent = {name: value for name, value in body.items() if value is not None}
        planned.append(PlannedRequest(arrival_s, sent))
    return planned


def endpoint_of(url: str) -> str:
    """The images endpoint of a server's address (`http://host:8000`) or of a client's base URL (`.../v1`)."""
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"Invalid URL {url}: {error}.") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigurationError(f"Invalid URL {url}; it must be like http://127.0.0.1:8000.")
    path = parsed.path.rstrip("/") or "/v1"
    return str(parsed.copy_with(path=f"{path}/images/generations"))


async def send_requests(
    endpoint: str,
    api_key: str | None,
    planned: Sequence[PlannedRequest],
    timeout_s: float,
    on_result: Callable[[Result], None],
) -> None:
    """Send each request at its time; results are reported as they finish."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    # A connection limit would make it a closed loop. With keep-alive, a request may use a closing connection.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(headers=headers, limits=limits, timeout=None) as client,
        asyncio.TaskGroup() as group,
    ):
        start = time.perf_counter()

        async def send(request: PlannedRequest) -> None:
            await asyncio.sleep(start + request.arrival_s - time.perf_counter())
            sent_s = time.perf_counter() - start
            response = error = message = None
            try:
                async with asyncio.timeout(timeout_s):
                    response = await client.post(endpoint, json=request.body)
            except TimeoutError:
                error, message = "timeout", f"no response within {timeout_s:g} s"
            except httpx.HTTPError as failure:
                error, message = type(failure).__name__, str(failure)
            finished_s = time.perf_counter() - start
            times = (request.arrival_s, sent_s, finished_s, finished_s - request.arrival_s)
            outcome = (0, error, message) if response is None else _read_response(response)
            on_result(Result(*times, request.body, *outcome))

        for request in planned:
            group.create_task(send(request))


def _read_response(response: httpx.Response) -> tuple[int, str | None, str | None]:
    """The number of images, and otherwise the error class and its message."""
    try:
        content = response.json()
    except ValueError:
        content = None
    match response.status_code, content:
        case 200, {"data": [{"b64_json": str()} | {"url": str()}, *_] as images}:
            return len(images), None, None
        case 200, _:
            return 0, "no image", response.text[:200]
        case status, {"error": {"message": str(message)}}:
            return 0, f"HTTP {status}", message
    return 0, f"HTTP {response.status_code}", response.text[:200]


def summarize(results: Sequence[Result]) -> dict[str, Any]:
    """Counts, rates and latencies; latencies are of successful requests, None if there are none."""
    latencies = [result.latency_s for result in results if not result.error]
    # From the first arrival to the last response.
    duration_s = max((result.finished_s for result in results), default=0.0)
    values = np.percentile(latencies, PERCENTILES).tolist() if latencies else [None] * len(PERCENTILES)
    return {
        "finished": len(results),
        "failed": len(results) - len(latencies),
        "duration_s": duration_s,
        "images_per_s": sum(result.images for result in results) / duration_s if duration_s else 0.0,
        "requests_per_s": len(latencies) / duration_s if duration_s else 0.0,
        "mean_s": sum(latencies) / len(latencies) if latencies else None,
        **{f"p{percent}_s": value for percent, value in zip(PERCENTILES, values, strict=True)},
        "max_s": max(latencies, default=None),
        # How late the client itself sent: a large value makes the measurement invalid.
        "max_send_delay_s": max((result.sent_s - result.arrival_s for result in results), default=0.0),
        "errors": dict(Counter(result.error for result in results if result.error)),
    }


def run_bench(
    endpoint: str, api_key: str | None, planned: Sequence[PlannedRequest], timeout_s: float
) -> tuple[list[Result], bool]:
    """Send the requests and show the progress; returns the results, and whether Ctrl-C ended the run."""
    results: list[Result] = []
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("requests", total=len(planned))

        def on_result(result: Result) -> None:
            results.append(result)
            progress.advance(task)

        try:
            asyncio.run(send_requests(endpoint, api_key, planned, timeout_s, on_result))
        except KeyboardInterrupt:
            return results, True
    return results, False


def _label(result: Result) -> str:
    """The size and steps of the request."""
    steps = result.body.get("num_inference_steps")
    return result.body.get("size", "default size") + (f", {steps} steps" if steps else "")


def print_results(results: Sequence[Result], console: Console) -> None:
    """Latency by size and steps, the throughput, and the errors by class, each with its first message."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(_label(result), []).append(result)
    table = Table("", title="Latency in seconds, from the planned arrival")
    columns = ("mean_s", *(f"p{percent}_s" for percent in PERCENTILES), "max_s")
    for heading in ("requests", "failed", *(column.removesuffix("_s") for column in columns)):
        table.add_column(heading, justify="right")
    for label, group in [*sorted(groups.items()), ("all", results)]:
        summary = summarize(group)
        latencies = ("-" if summary[column] is None else f"{summary[column]:.3f}" for column in columns)
        table.add_row(label, str(summary["finished"]), str(summary["failed"]), *latencies)
    console.print(table)
    total = summarize(results)
    console.print(
        f"Throughput: {total['images_per_s']:.3f} images/s, {total['requests_per_s']:.3f} requests/s "
        f"over {total['duration_s']:.1f} s; requests sent at most {total['max_send_delay_s']:.3f} s late.",
        soft_wrap=True,
    )
    for error, count in total["errors"].items():
        message = next(result.message for result in results if result.error == error) or ""
        # The server's text: one line, without control characters.
        message = "".join(c if c.isprintable() else " " for c in message)[:200]
        console.print(f"Error: {error} ({count} of {len(results)}), the first: {message}", soft_wrap=True)


def plot_results(results: Sequence[Result], file: Path) -> None:
    """Write a PNG of the latency over the time of arrival, and of its distribution."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    over_time, distribution = figure.subplots(1, 2, sharey=True, width_ratios=(2, 1))
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault("failed" if result.error else _label(result), []).append(result)
    for label, group in sorted(groups.items()):
        style = {"color": "black", "marker": "x"} if label == "failed" else {}
        times = [result.arrival_s for result in group], [result.latency_s for result in group]
        over_time.scatter(*times, s=14, label=label, **style)
    latencies = [result.latency_s for result in results if not result.error]
    if latencies:
        distribution.ecdf(latencies, orientation="horizontal", color="black")
        for percent, colour in zip(PERCENTILES, ("C0", "C1", "C3"), strict=True):
            value = float(np.percentile(latencies, percent))
            distribution.axhline(value, color=colour, linestyle="--", label=f"p{percent} {value:.3f} s")
        distribution.legend(fontsize="small")
    over_time.set(xlabel="planned arrival (s)", ylabel="latency (s)", ylim=(0, None))
    distribution.set(xlabel="share of requests")
    if groups:
        over_time.legend(fontsize="small")
    figure.savefig(file, format="png", dpi=120)
