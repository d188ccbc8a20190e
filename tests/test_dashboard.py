"""The dashboard and the alert rules in configs/, in the Prometheus of Debian that reads a real server."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.support.http_client import GENERATIONS, QUICK, assert_error, client_of, generate
from tests.support.live_server import LiveServer, free_port, start_server

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "prometheus"
RULES = CONFIGS / "hypergen.rules.yaml"
DASHBOARD = json.loads((ROOT / "configs" / "grafana" / "hypergen.json").read_text(encoding="utf-8"))
MODEL = "owner/small-sd"
# Grafana sets it from the scrape interval; here it spans all traffic, also on a slow machine.
RATE_INTERVAL = "5m"


def _program(name: str) -> str:
    """A program of Debian's package prometheus, which .ci/run installs."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed; Debian's package prometheus has it")
    return path


def _promtool(*arguments: str) -> None:
    command = [_program("promtool"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def _alerts() -> dict[str, Any]:
    groups = yaml.safe_load(RULES.read_text(encoding="utf-8"))["groups"]
    return {rule["alert"]: rule for group in groups for rule in group["rules"]}


def _queries() -> list[str]:
    panels = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
    return [target["expr"] for panel in panels for target in panel["targets"]]


@dataclass(frozen=True)
class Prometheus:
    client: httpx.Client

    def get(self, path: str, **parameters: str) -> Any:
        response = self.client.get(f"/api/v1/{path}", params=parameters)
        assert response.status_code == 200, response.text
        return response.json()["data"]

    def values(self, query: str) -> list[float]:
        """The value of each series that the query returns now."""
        return [float(series["value"][1]) for series in self.get("query", query=query)["result"]]

    def wait_for(self, query: str, expected: Callable[[list[float]], bool]) -> None:
        until = time.monotonic() + 20
        while not expected(values := self.values(query)):
            assert time.monotonic() < until, (query, values)
            time.sleep(0.1)

    def rules(self) -> list[dict[str, Any]]:
        """The alert rules after their next evaluation."""
        [group] = self.get("rules")["groups"]
        evaluated, until = group["lastEvaluation"], time.monotonic() + 20
        while group["lastEvaluation"] == evaluated:
            assert time.monotonic() < until, group
            time.sleep(0.1)
            [group] = self.get("rules")["groups"]
        return group["rules"]


@contextmanager
def _start_prometheus(folder: Path, server: LiveServer) -> Iterator[Prometheus]:
    """Prometheus with the files in configs/prometheus, but faster, and of this server."""
    shutil.copytree(CONFIGS, folder)
    (folder / "hypergen.key").write_text("sk-prometheus\n")
    address = f"127.0.0.1:{free_port()}"
    config = folder / "prometheus.yaml"
    text = config.read_text(encoding="utf-8")
    replacements = {"15s": "1s", "localhost:8000": server.url.removeprefix("http://")}
    for old, new in replacements.items():
        assert old in text
        text = text.replace(old, new)
    config.write_text(text, encoding="utf-8")
    _promtool("check", "config", str(config))
    command = [_program("prometheus"), f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://{address}", timeout=10) as client:
            _wait_until_ready(client, folder / "log")
            yield Prometheus(client)
    finally:
        process.terminate()
        process.wait(20)


def _wait_until_ready(client: httpx.Client, log: Path) -> None:
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if client.get("/-/ready").status_code == 200:
                return
        except httpx.ConnectError:
            pass
        time.sleep(0.1)
    raise AssertionError(log.read_text())


@dataclass(frozen=True)
class Monitored:
    """Prometheus after traffic, and the rules before a request was rejected."""

    prometheus: Prometheus
    healthy_rules: list[dict[str, Any]]


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[Monitored]:
    folder = tmp_path_factory.mktemp("monitored")
    keys = folder / "keys.txt"
    keys.write_text("shop: sk-shop\nlimited: sk-limited images_per_minute=1\nprometheus: sk-prometheus\n")
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32", "--served-model-name", MODEL)
    options = ("--price-rate", "0.01", "--api-key-file", str(keys))
    with (
        start_server(folder / "server", *arguments, *options, api_key="sk-setting") as server,
        _start_prometheus(folder / "prometheus", server) as prometheus,
        client_of(server) as client,
    ):
        generate(client)
        prometheus.wait_for("sum(hypergen_requests_total)", lambda values: values == [1])
        healthy_rules = prometheus.rules()
        # Rates need two values of each series; those of caches come with the engine's next report.
        prometheus.wait_for("sum(hypergen_cache_misses_total)", lambda values: sum(values) > 0)
        generate(client)
        prometheus.wait_for(
            f"sum(rate(hypergen_cache_hits_total[{RATE_INTERVAL}]))", lambda values: sum(values) > 0
        )
        limited = {"Authorization": "Bearer sk-limited"}
        assert client.post(GENERATIONS, json=QUICK, headers=limited).status_code == 200
        for count in (1, 2):
            assert_error(client.post(GENERATIONS, json=QUICK, headers=limited), 429)
            prometheus.wait_for("sum(hypergen_rejected_total)", lambda values, count=count: values == [count])
        yield Monitored(prometheus, healthy_rules)


@pytest.mark.parametrize("model", [".*", MODEL])
def test_every_query_of_the_dashboard_returns_figures(monitored: Monitored, model: str) -> None:
    for query in _queries():
        query = query.replace("$model", model).replace("$__rate_interval", RATE_INTERVAL)
        assert "$" not in query
        values = monitored.prometheus.values(query)
        assert values, query
        assert any(math.isfinite(value) for value in values), query


def test_the_dashboard_counts_the_traffic(monitored: Monitored) -> None:
    panels = {panel["title"]: panel for panel in DASHBOARD["panels"]}
    for title in ("Requests by outcome", "Images per second", "Rejections by reason", "Price per hour"):
        [target] = panels[title]["targets"]
        query = target["expr"].replace("$model", ".*").replace("$__rate_interval", RATE_INTERVAL)
        assert max(monitored.prometheus.values(query)) > 0, title


def test_the_variables_of_the_dashboard_are_its_data_source_and_the_models(monitored: Monitored) -> None:
    source, model = DASHBOARD["templating"]["list"]
    assert (source["type"], source["query"]) == ("datasource", "prometheus")
    [(metric, label)] = re.findall(r"label_values\((\w+), (\w+)\)", model["definition"])
    models = monitored.prometheus.get(f"label/{label}/values", **{"match[]": metric})
    assert models == [MODEL]
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            assert target["datasource"]["uid"] == f"${{{source['name']}}}"


def test_the_rules_load_and_none_fires_on_a_healthy_server(monitored: Monitored) -> None:
    rules = monitored.healthy_rules
    assert {rule["name"] for rule in rules} == set(_alerts())
    for rule in rules:
        assert (rule["health"], rule["state"]) == ("ok", "inactive"), rule


def test_the_rules_use_metrics_that_the_server_has(monitored: Monitored) -> None:
    for name, rule in _alerts().items():
        for metric in re.findall(r"\bhypergen_\w+", rule["expr"]):
            assert monitored.prometheus.values(f"count({metric})"), (name, metric)


def test_rules_have_a_severity_and_say_what_to_do() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    _promtool("check", "rules", str(RULES))
    for name, rule in _alerts().items():
        assert rule["for"]
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"]["summary"]
        assert 'See "Dashboard and alerts" in docs/operations.md.' in rule["annotations"]["description"]
        assert f"| `{name}` |" in guide


_BUCKET = 'hypergen_request_seconds_bucket{job="hypergen",instance="a",endpoint="e",outcome="ok"'
# Series by name, with one value per minute; in promtool's notation.
HEALTHY = {
    'up{job="hypergen",instance="a"}': "1x60",
    'hypergen_state{job="hypergen",instance="a",state="loading"}': "0x60",
    'hypergen_engine_up{job="hypergen",instance="a",engine="0"}': "1x60",
    'hypergen_engine_restarts_total{job="hypergen",instance="a",engine="0"}': "0x60",
    'hypergen_queue_waiting{job="hypergen",instance="a"}': "3x60",
    'hypergen_queue_overflow{job="hypergen",instance="a"}': "0x60",
    'hypergen_requests_total{job="hypergen",instance="a",outcome="ok"}': "0+100x60",
    'hypergen_requests_total{job="hypergen",instance="a",outcome="rejected"}': "0+1x60",
    'hypergen_requests_total{job="hypergen",instance="a",outcome="failed"}': "0+1x60",
    **dict.fromkeys((f'{_BUCKET},le="{le}"}}' for le in ("60", "120", "+Inf")), "0+100x60"),
}
# What changes in them when an alert must fire.
UNHEALTHY = {
    "HyperGenServerAbsent": {"up": "0x60"},
    "HyperGenLoadingSlowly": {"hypergen_state": "1x60", "hypergen_engine_up": "0x60"},
    "HyperGenEngineDown": {"hypergen_engine_up": "0x60"},
    "HyperGenEngineRestarts": {"hypergen_engine_restarts_total": "0x30 1x30"},
    "HyperGenQueueFilling": {"hypergen_queue_waiting": "60x60"},
    "HyperGenQueueOverflow": {"hypergen_queue_overflow": "1x60"},
    "HyperGenRejections": {'outcome="rejected"': "0+10x60"},
    "HyperGenFailures": {'outcome="failed"': "0+10x60"},
    "HyperGenLatency": {'le="60"': "0+90x60"},
}


def _rule_test(changes: dict[str, str], *firing: str) -> dict[str, Any]:
    """A unit test of promtool: what fires after 40 minutes of the healthy values with these changes."""
    series = dict(HEALTHY)
    for part, values in changes.items():
        changed = [name for name in HEALTHY if name.startswith(f"{part}{{") or part in name.partition("{")[2]]
        series |= dict.fromkeys(changed, values)
        assert changed
    return {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "promql_expr_test": [
            {
                "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                "eval_time": "40m",
                "exp_samples": [{"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing],
            }
        ],
    }


def _test_rules(folder: Path, *tests: dict[str, Any]) -> None:
    file = folder / "tests.yaml"
    content = {"rule_files": [str(RULES)], "evaluation_interval": "1m", "tests": list(tests)}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    _promtool("test", "rules", str(file))


def test_each_rule_fires_alone_when_its_figures_are_bad(tmp_path: Path) -> None:
    assert set(UNHEALTHY) == set(_alerts())
    unhealthy = [_rule_test(changes, name) for name, changes in UNHEALTHY.items()]
    _test_rules(tmp_path, _rule_test({}), *unhealthy)


def test_an_absent_target_is_an_absent_server(tmp_path: Path) -> None:
    absent = _rule_test({}, "HyperGenServerAbsent")
    series = absent["input_series"]
    absent["input_series"] = [entry for entry in series if not entry["series"].startswith("up{")]
    _test_rules(tmp_path, absent)
