"""`Idempotency-Key` between servers that share Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import pytest

from hypergen.api.idempotency import IdempotentRequests, StoredAnswers
from hypergen.api.redis_jobs import redis_answers
from hypergen.api.redis_jobs.connection import connect
from hypergen.api.redis_jobs.redis_answers import RedisAnswers
from hypergen.api.responses import Answer
from hypergen.errors import ConflictError, GenerationError
from tests.api.test_idempotency import Client
from tests.support.redis_server import RedisServer, start_redis


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def shared(redis: RedisServer) -> AsyncIterator[RedisAnswers]:
    with redis.client() as client:
        client.flushall()
    connection = connect(redis.url)
    yield RedisAnswers(connection, lifetime_s=60, max_bytes=10_000)
    await connection.aclose()


class Server:
    """A server whose requests are answered with a text of its own."""

    def __init__(self, shared: RedisAnswers, text: str) -> None:
        self.requests = IdempotentRequests(StoredAnswers(60, 100_000), shared)
        self.proceed = asyncio.Event()
        self.started = asyncio.Event()
        self.text = text

    async def work(self, _: Callable[[], Awaitable[object]]) -> Answer:
        self.started.set()
        await self.proceed.wait()
        if not self.text:
            raise GenerationError("It failed.")
        return Answer(202, {"x-name": "é"}, [self.text.encode(), b"!"], None, f"req_{self.text}")

    def send(self, body: str = "a", client: Client | None = None) -> asyncio.Task[Answer]:
        request = (client or Client()).request
        return asyncio.create_task(self.requests.answer(request, "key", "/a", {"prompt": body}, self.work))


def text_of(answer: Answer) -> str:
    return b"".join(answer.pieces).decode()


async def test_a_repeat_at_another_server_waits_for_the_first_and_gets_its_answer(
    shared: RedisAnswers,
) -> None:
    one, two = Server(shared, "one"), Server(shared, "two")
    first = one.send()
    await one.started.wait()
    client = Client()
    repeat = two.send(client=client)
    await asyncio.sleep(0.3)
    assert not repeat.done()
    one.proceed.set()
    answers = [await first, await repeat]
    assert [text_of(answer) for answer in answers] == ["one!", "one!"]
    assert [answer.is_repeated for answer in answers] == [False, True]
    assert answers[1].headers["x-name"] == "é"
    assert (answers[1].status, answers[1].model) == (202, None)
    assert client.request.state.record.repeat_of == "req_one"
    assert text_of(await two.send()) == "one!"
    assert not two.started.is_set()


async def test_another_body_is_a_conflict_also_while_the_first_runs(shared: RedisAnswers) -> None:
    one, two = Server(shared, "one"), Server(shared, "two")
    first = one.send()
    await one.started.wait()
    with pytest.raises(ConflictError):
        await two.send("b")
    one.proceed.set()
    await first
    with pytest.raises(ConflictError):
        await two.send("b")


async def test_a_failed_request_may_be_sent_to_another_server(shared: RedisAnswers) -> None:
    one, two = Server(shared, ""), Server(shared, "two")
    one.proceed.set()
    two.proceed.set()
    with pytest.raises(GenerationError):
        await one.send()
    answer = await two.send()
    assert (text_of(answer), answer.is_repeated) == ("two!", False)


async def test_the_key_of_a_dead_server_becomes_free(
    shared: RedisAnswers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_answers, "_CLAIM_S", 1)
    one, two = Server(shared, "one"), Server(shared, "two")
    slow = one.send()
    await one.started.wait()
    two.proceed.set()
    assert text_of(await two.send()) == "two!"  # the first one did not keep its claim
    one.proceed.set()
    assert text_of(await slow) == "two!"  # it was late: all clients get the same answer


async def test_a_long_request_keeps_its_key(
    shared: RedisAnswers, redis: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_answers, "_KEEP_EVERY_S", 0.05)
    one = Server(shared, "one")
    first = one.send()
    await one.started.wait()
    with redis.client() as client:
        (key,) = client.keys("hypergen:answer:*")
        client.expire(key, 1000)
        async with asyncio.timeout(30):
            while client.ttl(key) > 10:  # noqa: ASYNC110  it is in Redis
                await asyncio.sleep(0.02)
    one.proceed.set()
    await first


async def test_the_oldest_answers_are_dropped(shared: RedisAnswers, redis: RedisServer) -> None:
    def answer(size: int) -> Answer:
        return Answer(200, {}, [b"x" * size], "m", "req_1")

    async def is_kept(name: str) -> bool:
        claim = await shared.claim(("k", name), b"f", "reader")
        if claim is None:
            await shared.free(("k", name), "reader")
        return claim is not None

    for name in "abc":
        assert await shared.claim(("k", name), b"f", name) is None
        await shared.put(("k", name), name, answer(2000))
    assert [await is_kept(name) for name in "abc"] == [False, True, True]
    await shared.claim(("k", "d"), b"f", "d")
    await shared.put(("k", "d"), "d", answer(10_000))  # too large, and then its key is free
    assert [await is_kept(name) for name in "bcd"] == [True, True, False]
    with redis.client() as client:
        assert client.zcard("hypergen:answers") == 2


async def test_without_redis_a_request_is_answered_by_its_own_server(
    shared: RedisAnswers, redis: RedisServer
) -> None:
    one, two = Server(shared, "one"), Server(shared, "two")
    first = one.send()
    await one.started.wait()
    redis.kill()
    try:
        one.proceed.set()
        two.proceed.set()
        assert text_of(await first) == "one!"
        assert text_of(await one.send()) == "one!"
        assert text_of(await two.send()) == "two!"
    finally:
        redis.start()
