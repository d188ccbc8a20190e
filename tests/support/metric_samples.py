"""The metrics of a test server."""

from __future__ import annotations

import time
from collections.abc import Callable

import httpx
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def samples_of(client: httpx.Client, prefix: str = "hypergen_") -> list[Sample]:
    """The samples of /metrics whose name starts with `prefix`."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    return [sample for family in families for sample in family.samples if sample.name.startswith(prefix)]


def total(client: httpx.Client, name: str, **labels: str) -> float:
    """The sum of the samples of this name with these labels; 0 without any."""
    return sum(
        sample.value
        for sample in samples_of(client, name)
        if sample.name == name and labels.items() <= sample.labels.items()
    )


def wait_for(client: httpx.Client, name: str, expected: Callable[[float], bool], **labels: str) -> float:
    """Wait for a value of a metric that follows the engines' status, which is reported every second."""
    until = time.monotonic() + 60
    while not expected(value := total(client, name, **labels)):
        assert time.monotonic() < until, (name, labels, value)
        time.sleep(0.1)
    return value
