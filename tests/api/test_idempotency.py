"""The header `Idempotency-Key`: repeated requests get the answer of the first."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from uuid import uuid4

import httpx
import pytest
from starlette.requests import Request
from starlette.types import Message

from hypergen.api.errors import ClientDisconnectedError
from hypergen.api.idempotency import HEADER, IdempotentRequests, StoredAnswers, fingerprint
from hypergen.api.request_body import BodyLimit, BodyMemory
from hypergen.api.request_record import RequestRecord
from hypergen.api.responses import Answer
from hypergen.errors import ConflictError, GenerationError
from hypergen.request import ANONYMOUS, ApiKey
from tests.support.http_client import GENERATIONS, QUICK, SLOW, assert_error
from tests.support.image_files import as_file, gradient
from tests.support.live_server import LiveServer
from tests.support.log_lines import logged, text_fields
from tests.support.metric_samples import total

JOBS = "/v1/images/jobs"
EDITS = "/v1/images/edits"


def new_key() -> dict[str, str]:
    return {HEADER: uuid4().hex}


def without_own_headers(response: httpx.Response) -> dict[str, str]:
    own = ("date", "x-request-id", "idempotent-replayed")
    return {name: value for name, value in response.headers.items() if name not in own}


def test_a_repeat_gets_the_same_answer_and_generates_nothing(
    server: LiveServer, client: httpx.Client
) -> None:
    key = new_key()
    before = total(client, "hypergen_images_total")
    first = client.post(GENERATIONS, json=QUICK, headers=key)  # with a random seed
    reordered = dict(reversed(QUICK.items()))
    repeats = [client.post(GENERATIONS, json=body, headers=key) for body in (QUICK, reordered)]
    assert first.status_code == 200
    assert "idempotent-replayed" not in first.headers
    for repeat in repeats:
        assert repeat.status_code == 200
        assert repeat.headers["idempotent-replayed"] == "true"
        assert repeat.content == first.content
        assert without_own_headers(repeat) == without_own_headers(first)
        assert repeat.headers["x-request-id"] != first.headers["x-request-id"]
        fields = text_fields(logged(server, f"request_id={repeat.headers['x-request-id']}"))
        assert fields["repeat_of"] == first.headers["x-request-id"]
    assert client.post(GENERATIONS, json=QUICK, headers=new_key()).content != first.content
    assert total(client, "hypergen_images_total") - before == 2


def test_repeats_have_an_outcome_of_their_own(client: httpx.Client) -> None:
    key = new_key()
    model = client.get("/v1/models").json()["data"][0]["id"]
    before = total(client, "hypergen_requests_total", outcome="repeated", model=model)
    for _ in range(3):
        client.post(GENERATIONS, json=QUICK, headers=key)
    assert total(client, "hypergen_requests_total", outcome="repeated", model=model) - before == 2


def test_concurrent_repeats_share_one_answer(client: httpx.Client) -> None:
    key, body = new_key(), {**QUICK, "num_inference_steps": 30}
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(client.post, GENERATIONS, json=body, headers=key) for _ in range(4)]
        responses = [future.result() for future in futures]
    assert [response.status_code for response in responses] == [200] * 4
    assert len({response.content for response in responses}) == 1
    assert sum("idempotent-replayed" in response.headers for response in responses) == 3


@pytest.mark.parametrize(
    ("path", "body"), [(GENERATIONS, {**QUICK, "n": 2}), (JOBS, QUICK), ("/v1/image/generation", QUICK)]
)
def test_another_request_with_the_same_key_is_a_conflict(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    key = new_key()
    assert client.post(GENERATIONS, json=QUICK, headers=key).status_code == 200
    response = client.post(path, json=body, headers=key)
    assert HEADER in assert_error(response, 409, param=HEADER, code="idempotency_key_reused")
    assert response.headers["x-should-retry"] == "false"


def test_a_failed_request_may_be_sent_again(client: httpx.Client) -> None:
    key = new_key()
    assert_error(client.post(GENERATIONS, json={**QUICK, "n": 11}, headers=key), 400, param="n")
    response = client.post(GENERATIONS, json=QUICK, headers=key)
    assert response.status_code == 200
    assert "idempotent-replayed" not in response.headers


def test_a_repeated_form_has_another_boundary(client: httpx.Client) -> None:
    key, file = new_key(), as_file(gradient(64, 64))

    def edit(data: bytes) -> httpx.Response:
        fields = {"prompt": "a", "num_inference_steps": "1"}
        return client.post(EDITS, data=fields, files={"image": ("a.png", data)}, headers=key)

    first, repeat = edit(file), edit(file)
    assert first.request.headers["content-type"] != repeat.request.headers["content-type"]
    assert first.status_code == repeat.status_code == 200
    assert repeat.content == first.content
    assert_error(edit(as_file(gradient(72, 64))), 409, param=HEADER)


def test_a_repeated_job_is_the_same_job(client: httpx.Client) -> None:
    key = new_key()
    first, repeat = (client.post(JOBS, json=SLOW, headers=key) for _ in range(2))
    assert first.status_code == repeat.status_code == 202
    assert repeat.json() == first.json()
    assert repeat.headers["location"] == first.headers["location"]
    assert repeat.headers["idempotent-replayed"] == "true"
    client.delete(first.headers["location"])


@pytest.mark.parametrize("value", ["", "a" * 256, "two words", "\x7f", "é"])
@pytest.mark.parametrize("path", [GENERATIONS, JOBS])
def test_an_invalid_key_is_refused_by_name(client: httpx.Client, path: str, value: str) -> None:
    headers = [(HEADER.encode(), value.encode())]
    assert_error(client.post(path, json=QUICK, headers=headers), 400, param=HEADER)


def test_two_keys_are_refused_and_the_longest_is_not(client: httpx.Client) -> None:
    two = [(HEADER, "a"), (HEADER, "b")]
    assert_error(client.post(GENERATIONS, json=QUICK, headers=two), 400, param=HEADER)
    longest = {HEADER: "~" * 255}
    assert client.post(GENERATIONS, json=QUICK, headers=longest).status_code == 200


def test_streams_are_refused_with_a_key(client: httpx.Client) -> None:
    body = {**QUICK, "stream": True}
    message = assert_error(client.post(GENERATIONS, json=body, headers=new_key()), 400, param=HEADER)
    assert "'stream'" in message


def test_fingerprints_differ_by_route_and_by_every_value() -> None:
    bodies: list[dict[str, Any]] = [
        {},
        {"a": "1"},
        {"a": 1},
        {"a": True},
        {"a": b"1"},
        {"a": ["1"]},
        {"a": {"1": "1"}},
        {"a": [{"b": "c"}, "d"]},
        {"a": [{"b": "c", "d": "e"}]},
        {"a": "1", "b": "2"},
        {"a": "1b", "": "2"},
        {"a": "\ud800"},
    ]
    digests = {fingerprint(route, body) for body in bodies for route in ("/a", "/b")}
    assert len(digests) == 2 * len(bodies)
    assert fingerprint("/a", {"a": 1, "b": 2}) == fingerprint("/a", {"b": 2, "a": 1})


def make_answer(size: int = 10) -> Answer:
    return Answer(200, {"x-hypergen-model": "sd"}, [b"x" * size], "sd", "req_1")


def test_the_oldest_answers_are_dropped_first() -> None:
    answers = StoredAnswers(lifetime_s=60, max_bytes=30_000)
    for name in "abcd":
        answers.put(("k", name), b"", make_answer(7000))
    assert [name for name in "abcd" if answers.get(("k", name))] == ["b", "c", "d"]
    answers.put(("k", "e"), b"", make_answer(30_000))  # larger than the limit
    assert [name for name in "abcde" if answers.get(("k", name))] == ["b", "c", "d"]
    answers.put(("k", "d"), b"", make_answer(29_000))  # not the first of its key
    assert [name for name in "abcd" if answers.get(("k", name))] == ["b", "c", "d"]
    for number in range(100):  # small answers need memory, too
        answers.put(("k", str(number)), b"", make_answer(1))
    assert sum(answers.get(("k", str(number))) is not None for number in range(100)) < 15


def test_answers_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, now = StoredAnswers(lifetime_s=60, max_bytes=10_000), time.monotonic()
    answers.put(("k", "a"), b"", make_answer())
    monkeypatch.setattr(time, "monotonic", lambda: now + 59)
    assert answers.get(("k", "a"))
    monkeypatch.setattr(time, "monotonic", lambda: now + 61)
    assert answers.get(("k", "a")) is None


class Client:
    """A request in this process, whose client disconnects when told to."""

    def __init__(self, api_key: ApiKey = ANONYMOUS) -> None:
        self._disconnected = asyncio.Event()
        scope: dict[str, Any] = {"type": "http", "method": "POST", "path": GENERATIONS, "headers": []}
        scope["state"] = {
            "api_key": api_key,
            "record": RequestRecord.of(scope, "req_2"),
            "deadline": asyncio.get_running_loop().time() + 60,
            "body": BodyLimit(scope, self._receive, 1000, BodyMemory(1000)),
        }
        self.request = Request(scope, self._receive)

    async def _receive(self) -> Message:
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    def disconnect(self) -> None:
        self._disconnected.set()


class Work:
    """Work that waits, and counts how often it started and was cancelled."""

    def __init__(self) -> None:
        self.proceed = asyncio.Event()
        self.started = self.cancelled = 0

    async def __call__(self, wait_for_disconnect: Callable[[], Awaitable[object]]) -> Answer:
        self.started += 1
        try:
            await self.proceed.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return make_answer()


async def settle() -> None:
    """Let every task run until it waits."""
    for _ in range(5):
        await asyncio.sleep(0)
        await asyncio.to_thread(lambda: None)


def make_requests() -> tuple[IdempotentRequests, Work, Callable[[Client], asyncio.Task[Answer]]]:
    requests, work = IdempotentRequests(StoredAnswers(60, 100_000)), Work()

    def send(client: Client) -> asyncio.Task[Answer]:
        return asyncio.create_task(requests.answer(client.request, "key", "/a", {"prompt": "a"}, work))

    return requests, work, send


async def test_the_first_clients_disconnect_does_not_cancel_joined_work() -> None:
    _, work, send = make_requests()
    clients = [Client(), Client()]
    first, joined = (send(client) for client in clients)
    await settle()
    clients[0].disconnect()
    with pytest.raises(ClientDisconnectedError):
        await first
    work.proceed.set()
    answer = await joined
    assert answer.headers["idempotent-replayed"] == "true"
    assert (work.started, work.cancelled) == (1, 0)
    assert (await send(Client())).pieces == answer.pieces
    assert work.started == 1


async def test_the_last_clients_disconnect_cancels_the_work_and_a_repeat_starts_it_again() -> None:
    _, work, send = make_requests()
    clients = [Client(), Client()]
    sent = [send(client) for client in clients]
    await settle()
    for client in clients:
        client.disconnect()
    outcomes = await asyncio.gather(*sent, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ClientDisconnectedError] * 2
    assert (work.started, work.cancelled) == (1, 1)
    work.proceed.set()
    answer = await send(Client())
    assert "idempotent-replayed" not in answer.headers
    assert work.started == 2


async def test_a_joined_request_gets_the_error_of_the_first() -> None:
    requests, failed = IdempotentRequests(StoredAnswers(60, 100_000)), asyncio.Event()

    async def work(_: Callable[[], Awaitable[object]]) -> Answer:
        await failed.wait()
        raise GenerationError("It failed.")

    sent = [asyncio.create_task(requests.answer(Client().request, "key", "/a", {}, work)) for _ in range(2)]
    await settle()
    failed.set()
    outcomes = await asyncio.gather(*sent, return_exceptions=True)
    assert [str(outcome) for outcome in outcomes] == ["It failed."] * 2


async def test_a_running_request_with_another_body_is_a_conflict() -> None:
    requests, work, send = make_requests()
    first = send(Client())
    await settle()
    with pytest.raises(ConflictError):
        await requests.answer(Client().request, "key", "/a", {"prompt": "b"}, work)
    work.proceed.set()
    await first


async def test_api_keys_do_not_share_idempotency_keys() -> None:
    _, work, send = make_requests()
    work.proceed.set()
    for name in ("one", "two", "one"):
        await send(Client(ApiKey(name)))
    assert work.started == 2
