"""Requests that must be refused, each with the statuses that are right for it."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from scripts.bench.servers import GENERATIONS

EDITS = "/v1/images/edits"
JOBS = "/v1/images/jobs"
HYPERBOLIC = "/v1/image/generation"
_GOOD = {"prompt": "a red circle", "size": "256x256", "num_inference_steps": 2}
_JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class HostileInput:
    """A request, by default a POST of JSON.

    Attributes:
        statuses: those that are right for it.
        authorization: None: the server's key.
    """

    name: str
    path: str
    body: bytes
    statuses: tuple[int, ...] = (400,)
    method: str = "POST"
    headers: dict[str, str] = field(default_factory=lambda: dict(_JSON))
    authorization: str | None = None


def hostile_inputs() -> list[HostileInput]:
    """All inputs; none of them starts a generation."""
    return [*_fields(), *_json(), *_images(), *_routes_and_headers()]


def _post(
    name: str, path: str = GENERATIONS, statuses: tuple[int, ...] = (400,), **fields: Any
) -> HostileInput:
    return HostileInput(name, path, json.dumps({**_GOOD, **fields}).encode(), statuses)


def _fields() -> Iterator[HostileInput]:
    for size in (
        "1e3x8",
        "0x0",
        "512",
        "99999x99999",
        "-64x64",
        "\uff15\uff11\uff12x512",
        "5_12x512",
        "512x512x512",
        "1" * 9999,
    ):
        yield _post(f"size {size[:12]}", size=size)
    for n in (0, -1, 11, 1.5, "2", True, 10**30):
        yield _post(f"n {str(n)[:6]}", n=n)
    for steps in (0, -5, 10**9, "many", [20], {"a": 1}):
        yield _post(f"num_inference_steps {str(steps)[:8]}", num_inference_steps=steps)
    for guidance in (-1, 1e300, "high", [7.5]):
        yield _post(f"guidance_scale {guidance}", guidance_scale=guidance)
    for seed in (2**64, -2, 4.2, "seed", [1]):
        yield _post(f"seed {seed}", seed=seed)
    for prompt in ("", None, 7, ["a"], {"a": 1}, "x" * 1_000_000):
        yield _post(f"prompt {str(prompt)[:6]}", statuses=(400, 413), prompt=prompt)
    for path in (
        "../../etc/passwd",
        "/dev/zero",
        "file:///etc/passwd",
        "\x00",
        "~root",
        "https://example.com/a.safetensors",
    ):
        yield _post(f"lora_path {path[:20]!r}", lora_path=path)
    yield _post("sampler", sampler="__class__")
    yield _post("response_format", response_format="exe")
    yield _post("output_format", output_format="svg")
    yield _post("model", model=7)
    yield _post("steps of Hyperbolic", HYPERBOLIC, (400,), model_name="hypergen-tiny", steps=-1)


def _json() -> Iterator[HostileInput]:
    bodies = {
        "no JSON": b"prompt=a",
        "nothing": b"",
        "a list": b"[]",
        "NaN": b'{"prompt": "a", "guidance_scale": NaN}',
        "1e999": b'{"prompt": "a", "guidance_scale": 1e999}',
        "a number of 100,000 digits": b'{"prompt": "a", "n": ' + b"9" * 100_000 + b"}",
        "depth 100,000": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        "a key twice": b'{"prompt": "a", "prompt": "b"}',
        "invalid UTF-8": b'{"prompt": "\xff\xfe"}',
        "UTF-16": '{"prompt": "a"}'.encode("utf-16"),
        "two documents": b'{"prompt": "a"}{"prompt": "b"}',
        "half": b'{"prompt": "a',
    }
    for name, body in bodies.items():
        yield HostileInput(f"JSON: {name}", GENERATIONS, body)
        yield HostileInput(f"JSON of a job: {name}", JOBS, body)
    yield HostileInput("a lone surrogate", GENERATIONS, b'{"prompt": "\\ud800", "n": 0}')
    yield HostileInput(
        "24 MB of empty lists", GENERATIONS, b'{"x":[' + b",".join([b"[]"] * 8_000_000) + b"]}", (400, 413)
    )
    yield HostileInput("50 MB", GENERATIONS, b" " * 50_000_000, (413,))


def _png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header states a size, whatever its data are."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)

    header = width.to_bytes(4) + height.to_bytes(4) + bytes([8, 2, 0, 0, 0])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def _images() -> Iterator[HostileInput]:
    images = {
        "30000x30000": _png(30_000, 30_000, zlib.compress(bytes(1_000_000))),
        "2**31 wide": _png(2**31 - 1, 1),
        "no data": _png(64, 64),
        "half of its data": _png(64, 64, zlib.compress(bytes(64 * 64 * 3))[:20]),
        "SVG": b'<svg xmlns="http://www.w3.org/2000/svg"/>',
        "PDF": b"%PDF-1.7",
        "a pickle": b"\x80\x04.",
        "nothing": b"",
    }
    for name, content in images.items():
        url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
        yield _post(f"image: {name}", EDITS, images=[{"image_url": url}])
    for url in (
        "http://127.0.0.1:1/",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "data:" + ";" * 1_000_000,
    ):
        yield _post(f"image at {url[:24]}", EDITS, images=[{"image_url": url}])


def _routes_and_headers() -> Iterator[HostileInput]:
    good = json.dumps(_GOOD).encode()
    for key in ("", "Bearer wrong", "Bearer Bearer soak", "soak", "Basic c29haw=="):
        yield HostileInput(f"Authorization: {key}", GENERATIONS, good, (401,), authorization=key)
    for path in (
        "/v1/images/generations/../../etc/passwd",
        "/v1/files/..%2f..%2fetc",
        "/no/such",
        "//v1//images",
    ):
        yield HostileInput(f"GET {path}", path, b"", (404,), "GET", {})
    for media_type in ("text/plain", "application/x-www-form-urlencoded", "application/vnd.bentoml+pickle"):
        yield HostileInput(media_type, GENERATIONS, good, (400, 415), headers={"Content-Type": media_type})
    yield HostileInput(
        "gzip", GENERATIONS, zlib.compress(good), (400, 415), headers={**_JSON, "Content-Encoding": "gzip"}
    )
    yield HostileInput(
        "a form without boundary", EDITS, b"--x", (400,), headers={"Content-Type": "multipart/form-data"}
    )
    for key in ("k" * 256, "a b", ""):
        yield HostileInput(
            f"Idempotency-Key {key[:3]}", GENERATIONS, good, headers={**_JSON, "Idempotency-Key": key}
        )
    yield HostileInput("DELETE", GENERATIONS, b"", (405,), "DELETE", {})
