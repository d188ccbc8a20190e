"""Request bodies: strict JSON, and limits on size and time."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import Iterator

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from hypergen.api import request_body
from hypergen.api.api_keys import ApiKeys
from hypergen.api.middleware import OuterMiddleware
from hypergen.config import Settings
from hypergen.errors import InvalidRequestError
from tests.api.conftest import TightServer
from tests.api.test_json_bounds import read
from tests.support.http_client import GENERATIONS, JSON, QUICK, assert_error

GOOD = json.dumps(QUICK).encode()

INVALID_BODIES = {
    "empty": b"",
    "blank": b"  ",
    "list": b'[{"prompt": "a"}]',
    "text": b'"a"',
    "null": b"null",
    "truncated": GOOD[:-1],
    "two documents": GOOD + GOOD,
    "something after": GOOD + b"x",
    "single quotes": b"{'prompt': 'a'}",
    "comment": b'{"prompt": "a" /* a */}',
    "trailing comma": b'{"prompt": "a",}',
    "two BOMs": b"\xef\xbb\xbf" * 2 + GOOD,
    "UTF-16": GOOD.decode().encode("utf-16"),
    "UTF-16 without a BOM": GOOD.decode().encode("utf-16-le"),
    "UTF-32": GOOD.decode().encode("utf-32"),
    "broken UTF-8": b'{"prompt": "\xff\xfe"}',
    "surrogates as UTF-8": b'{"prompt": "\xed\xa0\x80"}',
    "raw control character": b'{"prompt": "a\x01"}',
    "NaN": b'{"prompt": "a", "guidance_scale": NaN}',
    "Infinity": b'{"prompt": "a", "guidance_scale": Infinity}',
    "-Infinity": b'{"prompt": "a", "lora_scale": -Infinity}',
    "NaN in an unknown field": b'{"prompt": "a", "other": [NaN]}',
    "10000 digits": b'{"prompt": "a", "n": ' + b"9" * 10_000 + b"}",
    "the same field twice": b'{"prompt": "a", "n": 1, "n": 2}',
    "the same inner field twice": b'{"prompt": "a", "other": {"x": 1, "x": 1}}',
    "deep lists": b'{"prompt": "a", "other": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"prompt": "a", "other": ' + b'{"a":' * 50_000 + b"1" + b"}" * 50_000 + b"}",
    "only brackets": b"[" * 100_000,
    "form": b"prompt=a",
}


@pytest.mark.parametrize("body", INVALID_BODIES.values(), ids=INVALID_BODIES)
def test_anything_but_one_json_object_is_rejected(client: httpx.Client, body: bytes) -> None:
    assert_error(client.post(GENERATIONS, content=body, headers=JSON), 400, param=None, code="invalid_json")


def test_a_byte_order_mark_is_ignored(client: httpx.Client) -> None:
    """RFC 8259, section 8.1, allows it."""
    body = b"\xef\xbb\xbf" + GOOD
    assert client.post(GENERATIONS, content=body, headers=JSON).status_code == 200
    items = b"\xef\xbb\xbf" + json.dumps({"items": [QUICK]}).encode()
    response = client.post("/generate", content=items, headers=JSON)
    assert (response.status_code, response.json()[0]["status"]) == (200, 200)


@pytest.mark.parametrize(
    ("encoding", "declared", "named"),
    [
        ("iso-8859-1", "; charset=iso-8859-1", "iso-8859-1"),
        ("iso-8859-1", '; charset="ISO-8859-1"', "ISO-8859-1"),
        ("utf-16", "; charset=utf-16", "utf-16"),
        ("utf-16", "", "utf-16"),
        ("utf-32-le", "", "utf-32-le"),
        ("utf-16", "; charset=utf-8", "utf-16"),
    ],
)
def test_the_error_names_the_charset_of_a_body_that_is_not_in_utf_8(
    encoding: str, declared: str, named: str
) -> None:
    body = json.dumps({"prompt": "Fuchs im Fluß"}, ensure_ascii=False).encode(encoding)
    content_type = "application/json" + declared
    with pytest.raises(InvalidRequestError) as raised:
        read(body, content_type=content_type)
    expected = f"The body is not valid JSON: it is in {named}, and JSON must be in UTF-8."
    assert raised.value.message == expected


def test_a_body_in_utf_8_is_accepted_whatever_charset_it_declares() -> None:
    """RFC 8259, section 11, defines no charset parameter."""
    body = {"prompt": "Fuchs im Fluß"}
    data = json.dumps(body, ensure_ascii=False).encode()
    assert read(data, content_type="application/json; charset=ISO-8859-1") == body


@pytest.mark.parametrize(
    "media_type",
    [
        None,
        "",
        "text/plain",
        "text/json",
        "application/jsonx",
        "application/x-www-form-urlencoded",
        "multipart/form-data; boundary=x",
        "application/vnd.bentoml+pickle",
    ],
)
def test_other_media_types_are_rejected(client: httpx.Client, media_type: str | None) -> None:
    headers = {} if media_type is None else {"Content-Type": media_type}
    response = client.post(GENERATIONS, content=GOOD, headers=headers)
    assert_error(response, 415, code="unsupported_media_type")


@pytest.mark.parametrize(
    "media_type", ["application/json", "application/json; charset=utf-8", "APPLICATION/JSON"]
)
def test_json_is_recognised_by_its_media_type(client: httpx.Client, media_type: str) -> None:
    response = client.post(GENERATIONS, content=GOOD, headers={"Content-Type": media_type})
    assert response.status_code == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "GZIP"])
def test_compressed_bodies_are_rejected(client: httpx.Client, encoding: str) -> None:
    headers = {**JSON, "Content-Encoding": encoding}
    response = client.post(GENERATIONS, content=gzip.compress(GOOD), headers=headers)
    assert_error(response, 415, code="unsupported_media_type")


def test_49_000_fields_are_accepted_and_51_000_rejected(client: httpx.Client) -> None:
    """A field has two tokens, and a body may have 100,000."""
    fields = {f"field{number}": number for number in range(51_000)}
    response = client.post(GENERATIONS, json={**QUICK, **fields})
    assert_error(response, 400, param=None, code="invalid_json")
    fewer = dict(list(fields.items())[:49_000])
    assert client.post(GENERATIONS, json={**QUICK, **fewer}).status_code == 200


def chunks(size: int) -> Iterator[bytes]:
    """A body without Content-Length."""
    yield b'{"prompt": "a", "other": "'
    for _ in range(size // 1000):
        yield b"a" * 1000
    yield b'"}'


@pytest.mark.parametrize("path", [GENERATIONS, "/generate", "/v1/nothing"])
def test_a_too_large_content_length_is_rejected(tight: TightServer, path: str) -> None:
    response = tight.client.post(path, content=b"a" * 100_001, headers=JSON)
    message = assert_error(response, 413, code="payload_too_large")
    assert "100,000" in message
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("path", [GENERATIONS, "/generate"])
def test_a_too_large_chunked_body_is_rejected(tight: TightServer, path: str) -> None:
    response = tight.client.post(path, content=chunks(200_000), headers=JSON)
    assert_error(response, 413, code="payload_too_large")


def test_a_body_at_the_limit_is_accepted(tight: TightServer) -> None:
    filling = {**QUICK, "other": ""}
    filling["other"] = "a" * (100_000 - len(json.dumps(filling)))
    body = json.dumps(filling).encode()
    assert len(body) == 100_000
    assert tight.client.post(GENERATIONS, content=body, headers=JSON).status_code == 200
    assert tight.client.post(GENERATIONS, content=chunks(99_000), headers=JSON).status_code != 413


def test_8_mb_are_accepted_with_an_input_image_and_rejected_without(client: httpx.Client) -> None:
    assert client.post(GENERATIONS, json={**QUICK, "image": "a" * 8_000_000}).status_code == 200
    response = client.post(GENERATIONS, json={**QUICK, "other": "a" * 8_000_000})
    message = assert_error(response, 413, code="payload_too_large")
    assert "without input images may have at most 1,000,000 bytes" in message
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize(("sent", "status"), [(0, 408), (1000, 408), (5000, 200)])
async def test_a_body_that_stalls_times_out(monkeypatch: pytest.MonkeyPatch, sent: int, status: int) -> None:
    """The timeout is 20 ms plus 1 ms per 10 bytes; the rest of the body arrives after 200 ms."""
    monkeypatch.setattr(request_body, "_STALL_TIMEOUT_S", 0.02)
    pieces = [b"a" * sent, b"a"]

    async def receive() -> Message:
        if len(pieces) == 1:
            await asyncio.sleep(0.2)
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert len(await Request(scope, receive).body()) == sent + 1
        await Response()(scope, receive, send)

    messages: list[Message] = []

    async def send(message: Message) -> None:
        messages.append(message)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    settings = Settings.model_validate({})
    await OuterMiddleware(app, ApiKeys(settings.server), settings)(scope, receive, send)
    assert messages[0]["status"] == status
    if status == 408:
        assert (b"connection", b"close") in [(name.lower(), value) for name, value in messages[0]["headers"]]
        assert json.loads(messages[1]["body"])["error"]["code"] == "request_timeout"
