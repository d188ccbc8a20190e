"""`url` results and images of jobs in object storage, with SeaweedFS."""

from __future__ import annotations

import asyncio
import base64
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest
from click.testing import CliRunner

from hypergen.api import image_urls
from hypergen.api.dialects import endpoints
from hypergen.api.jobs import MemoryJobs
from hypergen.api.request_record import RequestRecord
from hypergen.api.validated_request import ValidatedRequest
from hypergen.cli.main import main
from hypergen.config import Settings
from hypergen.engine_client.accelerators import Accelerator
from hypergen.engine_client.pool import EnginePool
from hypergen.errors import ConfigurationError, UnavailableError
from hypergen.events import ImageFinished
from hypergen.images.s3_storage import S3Storage
from hypergen.images.storage import open_storage
from tests.api.test_jobs import PATH, ended, submit, wait
from tests.support.http_client import GENERATIONS, QUICK, assert_error, client_of, generate
from tests.support.live_server import LiveServer, start_server
from tests.support.seaweedfs import BUCKET, SeaweedFS
from tests.support.sync_engine import make_request

ROOT = Path(__file__).parents[2]
ADDRESS = f"s3://{BUCKET}/results"
HYPERBOLIC_PATH = "/v1/image/generation"
HYPERBOLIC = {
    "model_name": "SD1.5",
    "prompt": "a red circle",
    "steps": 1,
    "width": 64,
    "height": 64,
    "seed": 3,
}


@pytest.fixture(scope="module")
def seaweedfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedFS]:
    seaweedfs = SeaweedFS(tmp_path_factory.mktemp("seaweedfs"))
    seaweedfs.start()
    yield seaweedfs
    seaweedfs.stop()


@pytest.fixture
def variables(seaweedfs: SeaweedFS, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """This process's environment has the variables of the storage."""
    for name, value in seaweedfs.environment.items():
        monkeypatch.setenv(name, value)
    return monkeypatch


@pytest.fixture(scope="module")
def storing(
    tmp_path_factory: pytest.TempPathFactory, sd_folder: Path, seaweedfs: SeaweedFS
) -> Iterator[LiveServer]:
    """A server with object storage, which clients reach by another name than the server."""
    environment = {
        **seaweedfs.environment,
        "HYPERGEN_STORAGE": ADDRESS,
        "HYPERGEN_STORAGE_PUBLIC_URL": f"http://localhost:{seaweedfs.ports['s3.port']}",
    }
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32")
    with start_server(tmp_path_factory.mktemp("server"), *arguments, environment=environment) as server:
        yield server


@pytest.fixture(scope="module")
def client(storing: LiveServer) -> Iterator[httpx.Client]:
    with client_of(storing) as client:
        yield client


@pytest.mark.parametrize(
    ("output_format", "extension", "media_type"),
    [("png", ".png", "image/png"), ("jpeg", ".jpg", "image/jpeg")],
)
def test_a_url_is_presigned_and_has_the_bytes_of_the_base64(
    client: httpx.Client, seaweedfs: SeaweedFS, output_format: str, extension: str, media_type: str
) -> None:
    items = generate(client, output_format=output_format, n=2)["data"]
    assert len({item["url"] for item in items}) == 2
    for item in items:
        url = urlsplit(item["url"])
        assert url.netloc == f"localhost:{seaweedfs.ports['s3.port']}"
        assert re.fullmatch(rf"/{BUCKET}/results/\d+-[\w-]{{32}}\{extension}", url.path)  # 192 bits in base64
        assert 3000 <= int(parse_qs(url.query)["X-Amz-Expires"][0]) <= 3600
        response = httpx.get(item["url"])
        assert response.status_code == 200
        assert response.content == base64.b64decode(item["b64_json"])
        assert response.headers["content-type"] == media_type
        assert response.headers["cache-control"] == "private, max-age=3600, immutable"


def test_a_url_without_its_signature_is_refused(client: httpx.Client) -> None:
    url = generate(client, response_format="url")["data"][0]["url"]
    plain, _, query = url.partition("?")
    other = "0" if url[-1] != "0" else "1"
    longer = re.sub(r"X-Amz-Expires=\d+", "X-Amz-Expires=86400", url)
    another = f"{plain[:-5]}x.png?{query}"
    for tampered in (plain, url[:-1] + other, longer, another):
        assert httpx.get(tampered).status_code == 403, tampered
    assert httpx.put(url, content=b"other").status_code == 403
    assert httpx.get(url).status_code == 200


def test_the_server_itself_serves_no_stored_file(client: httpx.Client) -> None:
    name = urlsplit(generate(client)["data"][0]["url"]).path.rpartition("/")[2]
    assert_error(client.get(f"/v1/images/files/{name}"), 404, code="not_found")


def test_a_forged_host_does_not_matter(client: httpx.Client) -> None:
    response = client.post(GENERATIONS, json=QUICK, headers={"Host": "192.0.2.1"})
    assert httpx.get(response.json()["data"][0]["url"]).status_code == 200


async def test_a_url_expires(variables: pytest.MonkeyPatch) -> None:
    storage = S3Storage(ADDRESS, lifetime_s=2)
    url = await storage.url(await storage.put(b"data", "png", "image/png"), "")
    until = time.monotonic() + 30
    async with httpx.AsyncClient() as client:
        while (response := await client.get(url)).status_code == 200:
            assert time.monotonic() < until
            await asyncio.sleep(0.2)
    assert response.status_code == 403


async def test_an_expired_image_is_not_read(variables: pytest.MonkeyPatch) -> None:
    """It is still in the bucket."""
    storage = S3Storage(ADDRESS, lifetime_s=0)
    assert await storage.read(await storage.put(b"data", "png", "image/png")) is None


def test_jobs_of_both_dialects_have_their_images(client: httpx.Client) -> None:
    """The response of each route: OpenAI's with `url`, Hyperbolic's with base64 alone."""
    openai, hyperbolic = (
        wait(client, submit(client, **body), ended)[-1]["result"]
        for body in ({**QUICK, "seed": 3}, HYPERBOLIC)
    )
    (item,) = openai["data"]
    assert httpx.get(item["url"]).content == base64.b64decode(item["b64_json"])
    assert item["b64_json"] == generate(client, seed=3)["data"][0]["b64_json"]
    assert hyperbolic["images"] == client.post(HYPERBOLIC_PATH, json=HYPERBOLIC).json()["images"]
    assert hyperbolic["images"][0].keys() == {"image", "seed"}


def test_without_the_storage_only_requests_with_a_url_fail(
    client: httpx.Client, storing: LiveServer, seaweedfs: SeaweedFS, variables: pytest.MonkeyPatch
) -> None:
    finished = wait(client, submit(client, **QUICK), ended)[-1]
    variables.setattr(image_urls, "_RETRY_DELAYS_S", (0.2,) * 500)
    image = ImageFinished(index=0, seed=0, data=b"kept", prompt_tokens=1, shared_forwards=0)
    storage = S3Storage(ADDRESS, lifetime_s=3600)
    seaweedfs.stop()
    try:
        for body in (QUICK, {**QUICK, "response_format": "url"}):
            response = client.post(GENERATIONS, json=body)
            message = assert_error(response, 503, param="response_format", code="storage_unavailable")
            assert "b64_json" in message
            assert response.headers["retry-after"] == "5"
        assert generate(client, response_format="b64_json")["data"]
        assert client.post(HYPERBOLIC_PATH, json=HYPERBOLIC).status_code == 200
        # An ended job is not lost, and not said to be.
        assert_error(client.get(f"{PATH}/{finished['id']}"), 503, code="storage_unavailable")
        assert storing.health()["status"] == "healthy"
        assert f" WARNING The object storage {ADDRESS} failed: " in storing.log()
        assert "Traceback" not in storing.log()
        # A job keeps an image that it cannot store at once.
        with ThreadPoolExecutor(1) as jobs:
            stored = jobs.submit(asyncio.run, image_urls.store_image_of_job(storage, make_request(), image))
            seaweedfs.start()
            assert asyncio.run(storage.read(stored.result())) == b"kept"
    finally:
        seaweedfs.start()
    again = wait(client, {"id": finished["id"]}, ended)[-1]
    assert again["result"]["data"][0]["b64_json"] == finished["result"]["data"][0]["b64_json"]
    until = time.monotonic() + 30
    while (response := client.post(GENERATIONS, json=QUICK)).status_code == 503:
        assert time.monotonic() < until
        time.sleep(0.5)
    assert httpx.get(response.json()["data"][0]["url"]).status_code == 200


async def test_a_job_whose_image_cannot_be_stored_fails_and_new_ones_are_refused(
    variables: pytest.MonkeyPatch,
) -> None:
    variables.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    variables.setattr(image_urls, "_RETRY_DELAYS_S", (0,))
    settings = Settings.model_validate({"server": {"storage": ADDRESS}})
    storage = open_storage(settings.server)
    storage.refuse_while_away()
    image = ImageFinished(index=0, seed=0, data=b"data", prompt_tokens=1, shared_forwards=0)
    with pytest.raises(UnavailableError, match="try again later") as failed:
        await image_urls.store_image_of_job(storage, make_request(), image)
    jobs = MemoryJobs(EnginePool(settings, accelerators=[Accelerator()]), storage, lifetime_s=60, max_jobs=1)
    validated, record = ValidatedRequest(make_request()), RequestRecord("req_1", "POST", PATH, None)
    with pytest.raises(UnavailableError) as refused:
        await jobs.submit(endpoints.GENERATIONS, validated, record, deadline=1e9)
    for raised in (failed.value, refused.value):
        assert (raised.code, raised.param, raised.retry_after_s) == ("storage_unavailable", None, 5)


@pytest.mark.parametrize(
    ("address", "changed", "reason"),
    [
        ("s3://nothing", {}, "NoSuchBucket"),
        (ADDRESS, {"AWS_SECRET_ACCESS_KEY": "wrong"}, "SignatureDoesNotMatch"),
        (ADDRESS, {"AWS_ACCESS_KEY_ID": "wrong"}, "InvalidAccessKeyId"),
        (ADDRESS, {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}, "Connection refused"),
    ],
)
def test_a_storage_that_cannot_be_used_is_refused_at_the_start(
    address: str, changed: dict[str, str], reason: str, variables: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in changed.items():
        variables.setenv(name, value)
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"server: {{storage: {address}}}")
    for command, name in (
        (["serve", "--storage", address], "--storage"),
        (["check", str(settings)], f"{settings}, line 1: server.storage"),
    ):
        error = CliRunner().invoke(main, command).exception
        assert isinstance(error, ConfigurationError)
        assert str(error).startswith(f"{name} {address} cannot be written and read: {reason}")
        assert "\n" not in str(error)


def test_bentoml_serve_ends_with_one_line_without_the_bucket(
    seaweedfs: SeaweedFS, storing: LiveServer
) -> None:
    environment = {
        **seaweedfs.environment,
        "HYPERGEN_STORAGE": "s3://nothing",
        "BENTOML_HOME": str(storing.log_file.parent / "bentoml"),
        "PYTHONPATH": str(ROOT),
        "PATH": "/usr/bin:/bin",
    }
    command = [sys.executable, "-m", "bentoml", "serve", "service:HyperGen", "--port", "0"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: HYPERGEN_STORAGE s3://nothing cannot be written and read: ")
    assert done.stderr.count("\n") == 1
