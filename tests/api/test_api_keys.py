"""The key file: names, hashes, comments and limits; read again when it changes."""

from __future__ import annotations

import asyncio
import hashlib
import os
import signal
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from hypergen.api.api_keys import ApiKeys
from hypergen.config import ServerSettings
from hypergen.errors import ConfigurationError
from hypergen.request import ApiKey
from tests.support.http_client import GENERATIONS, QUICK, assert_error
from tests.support.live_server import start_server


def _keys(file: Path, text: str, **settings: Any) -> ApiKeys:
    file.write_text(text)
    return ApiKeys(ServerSettings.model_validate({"api_key_file": file, **settings}))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.txt"


def test_every_form_of_a_line(file: Path) -> None:
    digest = hashlib.sha256(b"sk-hashed").hexdigest()
    text = f"""\ufeff# the team
sk-plain
   sk#with-hash   # a comment after a key

shop: sk-shop requests=4 images_per_minute=60 priority=high
shop:\tsk-shop-new  images_per_minute=60 requests=4 priority=high
hashed: sha256:{digest.upper()}
"""
    keys = _keys(file, text, api_key="sk-setting")
    shop = ApiKey("shop", "high", 4, 60)
    assert keys.find(b"sk-shop") == keys.find(b"sk-shop-new") == shop
    assert keys.find(b"sk-hashed") == ApiKey("hashed")
    assert keys.find(b"sk-setting") == ApiKey("api-key")
    plain = hashlib.sha256(b"sk-plain").hexdigest()[:8]
    assert keys.find(b"sk-plain") == ApiKey(f"key-{plain}")
    assert keys.find(b"sk#with-hash") is not None
    for wrong in (b"", b"shop", b"#", b"sk-", digest.encode(), f"sha256:{digest}".encode()):
        assert keys.find(wrong) is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no key"),
        ("# nothing\n\n", "has no key"),
        ("a: sk-1\nb: sk-1", "line 2: has the same key as an earlier line"),
        ("a: sk-1 requests=1\na: sk-2 requests=2", "line 2: gives 'a' other limits"),
        ("a: sk-1 requests=0", "line 1: requests: "),
        ("a: sk-1 priority=urgent", "line 1: priority: "),
        ("a: sk-1 speed=1", "line 1: speed: "),
        ("shop: requests=4", "line 1: must be KEY or NAME: KEY"),
        ("two words", "line 1: must be KEY or NAME: KEY"),
        ("a b: sk-1", "line 1: must be KEY or NAME: KEY"),
    ],
)
def test_an_invalid_file_is_refused_by_its_line(file: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        _keys(file, text)
    assert message in str(raised.value)
    assert "sk-" not in str(raised.value)


def test_a_changed_file_is_read_again_and_an_invalid_one_changes_nothing(file: Path) -> None:
    keys = _keys(file, "sk-one")
    file.write_text("sk-two-longer")
    assert keys.find(b"sk-one") is None
    assert keys.find(b"sk-two-longer") is not None
    for text in ("", "not a key file"):
        file.write_text(text)
        assert keys.find(b"sk-two-longer") is not None
    file.unlink()
    assert keys.find(b"sk-two-longer") is not None
    file.write_text("sk-three")
    assert keys.find(b"sk-two-longer") is None


def test_a_server_reads_its_file_again_and_enforces_limits(tmp_path: Path, file: Path) -> None:
    file.write_text("shop: sk-shop images_per_minute=2\n")
    with (
        start_server(tmp_path, "--device", "cpu", "--api-key-file", str(file)) as server,
        httpx.Client(base_url=server.url, timeout=60) as client,
    ):

        def generate(key: str, **changes: Any) -> httpx.Response:
            headers = {"Authorization": f"Bearer {key}"}
            return client.post(GENERATIONS, json={**QUICK, **changes}, headers=headers)

        assert_error(generate("sk-shop", n=3), 400, param="n")
        assert generate("sk-shop", n=2).status_code == 200
        refused = generate("sk-shop")
        assert "2 images per minute" in assert_error(refused, 429, param=None, code="rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        assert_error(generate("sk-new"), 401, param=None, code="invalid_api_key")
        file.write_text("shop: sk-shop images_per_minute=2\nnew: sk-new\n")
        os.kill(server.process.pid, signal.SIGHUP)
        assert generate("sk-new").status_code == 200
        time.sleep(1)
        assert generate("sk-new").status_code == 200  # the signal has restarted nothing
        assert_error(generate("sk-shop"), 429, param=None, code="rate_limit_exceeded")


@pytest.fixture
def two_keys(file: Path) -> Path:
    file.write_text("busy: sk-busy\nother: sk-other\n")
    return file


async def test_many_requests_of_one_key_do_not_hold_up_one_of_another(tmp_path: Path, two_keys: Path) -> None:
    body = {**QUICK, "num_inference_steps": 4, "size": "64x64"}
    finished: list[str] = []
    arguments = ("--device", "cpu", "--api-key-file", str(two_keys), "--max-queue-size", "10")
    with start_server(tmp_path, *arguments) as server:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:

            async def generate(key: str) -> int:
                headers = {"Authorization": f"Bearer {key}"}
                response = await client.post(GENERATIONS, json=body, headers=headers)
                finished.append(key)
                return response.status_code

            busy = [asyncio.create_task(generate("sk-busy")) for _ in range(60)]
            while finished.count("sk-busy") < 5:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
            before = len(finished)
            assert await generate("sk-other") == 200
            assert len(finished) - before <= 20  # in the order of arrival it would be the last
            statuses = await asyncio.gather(*busy)
    assert statuses.count(200) + statuses.count(429) == 60
    assert statuses.count(200) >= 50  # the two queues and the running ones
