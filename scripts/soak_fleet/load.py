"""Clients that send jobs to replicas at random, and collect every result twice, at two replicas."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
import uuid
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx

from scripts.soak_fleet.fleet import Fleet

JOBS = "/v1/images/jobs"
# Jobs with the same seed must have the same bytes, whichever replica finished them. The others have no seed.
_SEEDS = 20
_CLIENTS = 4
_POLL_S = 0.2
_PATIENCE_S = 600


@dataclass(eq=False)
class Load:
    """What became of the jobs.

    Attributes:
        digests: job -> digests of its images, one for each time that its result was read.
        by_seed: seed -> digests of the jobs with this seed.
        bad: job -> how it ended, if not with a result.
        sent_twice: requests that were sent again because a replica was killed.
    """

    fleet: Fleet
    jobs: int
    steps: int  # of each job
    until: float  # monotonic seconds, after which no more jobs are sent
    random: random.Random
    digests: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))
    by_seed: defaultdict[int, set[str]] = field(default_factory=lambda: defaultdict(set))
    bad: dict[str, str] = field(default_factory=dict)
    sent: int = 0
    done: int = 0
    sent_twice: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        """Send all jobs and wait for their results."""
        with ThreadPoolExecutor(_CLIENTS) as clients:
            list(clients.map(self._client, range(_CLIENTS)))

    def _client(self, number: int) -> None:
        pending: dict[str, int | None] = {}
        with httpx.Client(timeout=30, trust_env=False) as client:
            numbers = range(number, self.jobs, _CLIENTS)
            for index in numbers:
                if time.monotonic() > self.until:
                    break
                seed = index % (2 * _SEEDS) // 2 if index % 2 else None
                pending[self._send(client, seed)] = seed
                # Enough jobs wait to fill the replicas, and a queue is left when one is killed.
                while len(pending) > 30:
                    self._collect(client, pending)
            patience = time.monotonic() + _PATIENCE_S
            while pending and time.monotonic() < patience:
                self._collect(client, pending)
        with self.lock:
            self.bad |= dict.fromkeys(pending, "lost: no end in time")

    def _send(self, client: httpx.Client, seed: int | None) -> str:
        """Create a job, at another replica if one does not answer; returns its id."""
        body: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": self.steps, "size": "64x64"}
        body |= {"response_format": "b64_json"} | ({} if seed is None else {"seed": seed})
        headers = {"Idempotency-Key": uuid.uuid4().hex}
        with self.lock:
            self.sent += 1
        while True:
            try:
                response = client.post(self._any_url() + JOBS, json=body, headers=headers)
                if response.status_code == 202:
                    return response.json()["id"]
            except httpx.HTTPError:
                pass
            with self.lock:
                self.sent_twice += 1
            time.sleep(_POLL_S)

    def _collect(self, client: httpx.Client, pending: dict[str, int | None]) -> None:
        """Ask for every pending job; a result is read at two replicas."""
        for job, seed in list(pending.items()):
            status, digest = self._read(client, job)
            if status in ("queued", "running", "away"):
                continue
            again = self._read(client, job)
            while again[0] == "away":
                time.sleep(_POLL_S)
                again = self._read(client, job)
            del pending[job]
            with self.lock:
                if status != "succeeded" or again[0] != "succeeded":
                    self.bad[job] = f"{status}, then {again[0]}"
                    continue
                self.done += 1
                self.digests[job] |= {digest, again[1]}
                if seed is not None:
                    self.by_seed[seed] |= {digest, again[1]}
        time.sleep(_POLL_S)

    def _read(self, client: httpx.Client, job: str) -> tuple[str, str]:
        """The state of a job, and a digest of its images."""
        try:
            response = client.get(f"{self._any_url()}{JOBS}/{job}")
        except httpx.HTTPError:
            return "away", ""
        if response.status_code == 503:
            return "away", ""
        if response.status_code != 200:
            return f"lost: {response.status_code}", ""
        body = response.json()
        images = [(item["seed"], item["b64_json"]) for item in body.get("result", {}).get("data", [])]
        return body["status"], hashlib.sha256(json.dumps(images).encode()).hexdigest()

    def _any_url(self) -> str:
        with self.lock:
            return self.random.choice(self.fleet.replicas).url
