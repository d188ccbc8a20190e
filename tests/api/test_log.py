"""The log: one line per request, as text and as JSON, without anything that clients keep private."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest

from tests.support.http_client import GENERATIONS, QUICK, assert_error, client_of
from tests.support.live_server import LiveServer, start_server
from tests.support.log_lines import LINE, json_lines, logged, text_fields
from tests.support.metric_samples import total

HOSTILE_PROMPT = (
    'a very private prompt\n2026-11-20T00:00:00.000Z [http] INFO FORGED\x1b[31m\x00" status=200\u2028'
)


@pytest.mark.parametrize(("path", "status"), [("/v1/models", 200), ("/nothing", 404), ("/schema.json", 200)])
def test_every_request_is_one_log_line(
    server: LiveServer, client: httpx.Client, path: str, status: int
) -> None:
    line = logged(server, client.get(path).headers["x-request-id"])
    match = LINE.fullmatch(line)
    assert match, line
    _, part, level, message = match.groups()
    assert (part, level) == ("http", "INFO")
    assert message.startswith(f"GET {path} {status} ms=")


def test_probes_are_not_logged(server: LiveServer, client: httpx.Client) -> None:
    ids = [client.get(path).headers["x-request-id"] for path in ("/health", "/livez")]
    logged(server, client.get("/v1/models").headers["x-request-id"])
    assert not [request_id for request_id in ids if request_id in server.log()]


def test_the_line_of_a_generated_image_says_what_ran_and_how_long(
    server: LiveServer, client: httpx.Client
) -> None:
    body = {**QUICK, "n": 2, "num_inference_steps": 3}
    response = client.post(GENERATIONS, json=body)
    assert response.status_code == 200
    fields = text_fields(logged(server, response.headers["x-request-id"]))
    times = {name: int(fields.pop(name)) for name in list(fields) if name.endswith("ms")}
    assert 1 <= float(fields.pop("images_per_forward")) <= 2  # by the measured costs
    assert fields == {
        "request_id": response.headers["x-request-id"],
        "model": client.get("/v1/models").json()["data"][0]["id"],
        "n": "2",
        "size": "128x128",
        "steps": "3",
        "client": "127.0.0.1",
    }
    assert set(times) == {"ms", "queue_ms", "encode_ms", "denoise_ms", "write_ms"}
    parts = sum(milliseconds for name, milliseconds in times.items() if name != "ms")
    assert times["denoise_ms"] <= parts <= times["ms"] + 5


def test_the_line_of_a_refusal_has_its_code_and_param(server: LiveServer, client: httpx.Client) -> None:
    response = client.post(GENERATIONS, json={**QUICK, "n": 99})
    fields = text_fields(logged(server, response.headers["x-request-id"]))
    assert (fields["error_code"], fields["error_param"]) == ("invalid_value", "n")
    assert "model" not in fields


def test_a_stream_that_its_client_leaves_is_logged_and_counted_as_cancelled(
    server: LiveServer, client: httpx.Client
) -> None:
    before = total(client, "hypergen_requests_total", outcome="cancelled")
    body = {**QUICK, "num_inference_steps": 150, "n": 8, "stream": True, "partial_images": 3}
    with client.stream("POST", GENERATIONS, json=body) as response:
        request_id = response.headers["x-request-id"]
        next(response.iter_raw())
    line = logged(server, request_id)
    assert f"POST {GENERATIONS} 200 " in line
    assert text_fields(line)["outcome"] == "cancelled"
    assert total(client, "hypergen_requests_total", outcome="cancelled") == before + 1


def test_a_page_of_another_site_is_counted_as_forbidden(server: LiveServer, client: httpx.Client) -> None:
    before = total(client, "hypergen_requests_total", outcome="forbidden")
    headers = {"Origin": "https://other.example", "Sec-Fetch-Site": "cross-site"}
    response = client.post(GENERATIONS, json=QUICK, headers=headers)
    assert_error(response, 403)
    assert text_fields(logged(server, response.headers["x-request-id"]))["error_code"] == "cross_site"
    assert total(client, "hypergen_requests_total", outcome="forbidden") == before + 1


def test_forwarded_addresses_are_ignored_without_a_trusted_proxy(
    server: LiveServer, client: httpx.Client
) -> None:
    response = client.get("/v1/models", headers={"X-Forwarded-For": "203.0.113.9"})
    assert text_fields(logged(server, response.headers["x-request-id"]))["client"] == "127.0.0.1"


def test_a_path_cannot_forge_a_log_line(server: LiveServer, client: httpx.Client) -> None:
    hostile = "/x%0d%0a2026-11-20 FORGED%1b[31m%00%08%c2%85%e2%80%a8%5cn ms=1"
    response = client.get(hostile)
    assert_error(response, 404)
    line = logged(server, response.headers["x-request-id"])
    assert "GET /x%0D%0A2026-11-20%20FORGED%1B%5B31m%00%08%C2%85%E2%80%A8%5Cn%20ms=1 404 ms=" in line
    assert line.isprintable()
    assert not [each for each in server.log().splitlines() if each.startswith("2026-11-20")]
    assert "\x1b[31m" not in server.log()


def test_a_long_path_is_truncated(server: LiveServer, client: httpx.Client) -> None:
    response = client.get("/" + "a" * 5000)
    assert len(logged(server, response.headers["x-request-id"])) < 400


def test_prompts_and_queries_are_not_logged(server: LiveServer, client: httpx.Client) -> None:
    private = {"prompt": HOSTILE_PROMPT, "negative_prompt": "another private prompt"}
    response = client.post(GENERATIONS, json={**QUICK, **private})
    assert response.status_code == 200
    client.post(GENERATIONS, json={"prompt": "a third private prompt", "n": 99})
    client.post(GENERATIONS, json={"prompt": ["a private list"], "private": 1})
    last = client.get("/v1/models", params={"api_key": "private"})
    logged(server, last.headers["x-request-id"])
    assert "private" not in server.log()


def test_all_lines_of_all_processes_have_one_form(server: LiveServer) -> None:
    lines = server.log().split("\n")
    assert lines.pop() == ""
    assert [line for line in lines if not line.isprintable()] == []
    matches = [LINE.fullmatch(line) for line in lines if not line.startswith("  ")]  # tracebacks are indented
    assert None not in matches, [line for line in lines if not LINE.fullmatch(line)]
    parts = {match[2] for match in matches if match}
    model = server.health()["model"]
    assert parts == {"serve", "http", f"engine {model}"}
    messages = [match[4] for match in matches if match]
    for start in ("Starting production HTTP BentoServer", f"Loading {model}: 0.00"):
        assert len([message for message in messages if message.startswith(start)]) == 1, start
    # Another test may have imported the model.
    assert len([message for message in messages if message.startswith("Importing ")]) <= 1
    (loaded,) = [message for message in messages if message.startswith(f"Loaded {model} in ")]
    assert loaded.endswith(" GB on cpu.")
    (ready,) = [message for message in messages if message.startswith("Ready: engine 1 of 1, ")]
    assert model in ready


def test_json_lines_have_the_same_content_in_utc(observed: LiveServer) -> None:
    with client_of(observed) as client:
        response = client.post(GENERATIONS, json={**QUICK, "prompt": HOSTILE_PROMPT})
        assert response.status_code == 200
        refused = client.post(GENERATIONS, json={**QUICK, "n": 99})
        logged(observed, refused.headers["x-request-id"])
    by_id = {line["request_id"]: line for line in json_lines(observed) if "request_id" in line}
    line = by_id[response.headers["x-request-id"]]
    age = datetime.now(UTC) - datetime.fromisoformat(line["time"])
    assert timedelta(0) <= age < timedelta(seconds=30)
    expected = {
        "level": "info",
        "part": "http",
        "message": f"POST {GENERATIONS} 200",
        "method": "POST",
        "path": GENERATIONS,
        "status": 200,
        "key": "api-key",
        "model": "owner/small-sd",
        "n": 1,
        "size": "128x128",
        "steps": 1,
        "images_per_forward": 1.0,
        "client": "127.0.0.1",
    }
    assert expected.items() <= line.items()
    times = {"ms", "queue_ms", "encode_ms", "denoise_ms", "write_ms"}
    assert set(line) == {*expected, *times, "time", "request_id"}
    assert {type(line[name]) for name in times} == {int}
    error = by_id[refused.headers["x-request-id"]]
    assert (error["status"], error["error_code"], error["error_param"]) == (400, "invalid_value", "n")


def test_every_json_line_is_an_object_without_prompts_keys_and_control_characters(
    observed: LiveServer,
) -> None:
    with client_of(observed) as client:
        client.post(GENERATIONS, json={**QUICK, "prompt": HOSTILE_PROMPT, "n": 99})
        wrong = client.get("/v1/models", headers={"Authorization": "Bearer sk-not-observed"})
        assert_error(wrong, 401)
        logged(observed, wrong.headers["x-request-id"])
    for text in observed.log().splitlines():
        assert text.isascii()
        assert text.isprintable()
        line = json.loads(text)
        assert {"time", "level", "part", "message"} <= set(line)
        assert line["part"] != "engine" or line["model"] == "owner/small-sd"
    assert {line["part"] for line in json_lines(observed)} == {"serve", "http", "engine"}
    for secret in ("private", "sk-observed", "sk-not-observed"):
        assert secret not in observed.log()


def test_the_log_level_is_that_of_all_processes(tmp_path: Path, sd_folder: Path) -> None:
    arguments = (str(sd_folder), "--device", "cpu", "--log-level", "warning")
    with start_server(tmp_path, *arguments) as server, client_of(server) as client:
        assert client.post(GENERATIONS, json={**QUICK, "prompt": "word " * 400}).status_code == 200
        line = logged(server, "Truncated a prompt")
        assert " WARNING Truncated a prompt from " in line
        assert {match[3] for each in server.log().splitlines() if (match := LINE.fullmatch(each))} == {
            "WARNING"
        }
