"""The queue of jobs in Redis: what its commands promise, without an engine."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any

import pytest
from redis import Redis

from hypergen.api.dialects.endpoints import EDITS, ENDPOINTS, GENERATIONS
from hypergen.api.redis_jobs.connection import check_redis, connect, without_password
from hypergen.api.redis_jobs.job_queue import Beat, JobQueue, QueueLimits
from hypergen.api.redis_jobs.records import decode_error, decode_request, encode_request
from hypergen.errors import ConfigurationError, GenerationError, UnavailableError
from hypergen.request import ANONYMOUS, ApiKey, ControlInput, InputImage
from tests.support.live_server import free_port
from tests.support.redis_server import RedisServer, start_redis
from tests.support.sync_engine import make_request

LIMITS = QueueLimits(lifetime_s=60, max_jobs=100, max_image_bytes=1000, max_input_bytes=1000)


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with start_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
async def queues(redis: RedisServer) -> AsyncIterator[list[JobQueue]]:
    """The queue as two replicas see it."""
    with redis.client() as client:
        client.flushall()
    connection = connect(redis.url)
    queues = [JobQueue(connection, name, LIMITS) for name in ("one", "two")]
    await queues[0].create_group()
    yield queues
    await connection.aclose()


def with_limits(queue: JobQueue, **changes: Any) -> JobQueue:
    queue._limits = replace(LIMITS, **changes)
    return queue


async def submit(
    queue: JobQueue, job_id: str, api_key: ApiKey = ANONYMOUS, n: int = 1, **fields: bytes
) -> tuple[str, int]:
    fields = {"endpoint": b"e", "request": b"r", "created": b"1", **fields}
    return await queue.submit(job_id, fields, time.time() + 60, api_key, n)


async def state_of(queue: JobQueue, job_id: str) -> str:
    fields, _ = await queue.get(job_id)
    return fields["state"].decode()


async def test_jobs_are_delivered_once_in_order(queues: list[JobQueue]) -> None:
    assert [await submit(queues[0], name) for name in ("a", "b", "c")] == [
        ("done", 0),
        ("done", 1),
        ("done", 2),
    ]
    await queues[1].create_group()  # it exists
    first, rest = await queues[0].read(1, 0.1), await queues[1].read(5, 0.1)
    assert [entry.job_id for entry in (*first, *rest)] == ["a", "b", "c"]
    assert await queues[0].read(5, 0.01) == []
    await queues[0].beat([Beat(first[0], "running", 2, 5, time.time() + 9)])
    assert [(await queues[0].get(name))[1] for name in ("a", "b", "c")] == [0, 1, 2]  # nobody took them
    assert (await queues[0].take(first[0]))["deliveries"] == b"1"
    assert await queues[0].beat([Beat(first[0], "running", 2, 5, time.time() + 9)]) == set()
    assert [(await queues[0].get(name))[1] for name in ("a", "b", "c")] == [None, 0, 1]
    assert await queues[1].waiting() == 2
    fields, _ = await queues[1].get("a")
    assert (fields["state"], fields["step"], fields["steps"]) == (b"running", b"2", b"5")


async def test_the_same_call_twice_creates_one_job(queues: list[JobQueue]) -> None:
    assert await submit(queues[0], "a") == await submit(queues[0], "a") == ("done", 0)
    assert len(await queues[0].read(5, 0.1)) == 1


async def test_the_first_end_counts(queues: list[JobQueue], redis: RedisServer) -> None:
    await submit(queues[0], "a", image=b"pixels")
    (entry,) = await queues[0].read(1, 0.1)
    await queues[0].take(entry)
    assert await queues[0].finish("a", "succeeded", images=b"[]", files={0: b"first"}) == "done"
    assert await queues[1].finish("a", "succeeded", images=b"[]", files={0: b"other"}) == "ended"
    assert await queues[1].finish("a", "cancelled") == "ended"
    assert await queues[1].finish("b", "cancelled") == "unknown"
    assert await queues[1].images("a") == {0: b"first"}
    assert await state_of(queues[1], "a") == "succeeded"
    assert await queues[0].take(entry) == {}
    with redis.client() as client:
        assert client.xlen("hypergen:queue") == 0
        assert client.xpending("hypergen:queue", "replicas")["pending"] == 0
        assert client.hgetall("hypergen:totals") == {b"image_bytes": b"5"}
        assert not client.hexists("hypergen:job:a", "image")
        assert 0 < client.ttl("hypergen:job:a") <= 60
        assert 0 < client.ttl("hypergen:images:a") <= 60
        assert client.zcard("hypergen:unfinished") == client.zcard("hypergen:waiting") == 0


async def test_a_silent_replicas_jobs_are_taken_over(queues: list[JobQueue]) -> None:
    await submit(queues[0], "a")
    (entry,) = await queues[0].read(1, 0.1)
    await queues[0].take(entry)
    assert await queues[1].take_over(5, silent_s=60) == []
    assert await queues[1].take_over(5, silent_s=0) == [entry]
    assert (await queues[1].take(entry))["deliveries"] == b"2"
    assert await queues[0].beat([Beat(entry, "running")]) == {"a"}  # it learns that it lost the job
    assert await queues[1].beat([Beat(entry, "running")]) == set()


async def test_jobs_are_found_among_many_of_living_replicas(queues: list[JobQueue]) -> None:
    """One call of XAUTOCLAIM looks at ten entries for each one that it may return."""
    for index in range(40):
        await submit(queues[0], f"job{index}")
    entries = await queues[0].read(40, 0.1)
    for entry in entries:
        await queues[0].take(entry)
    await asyncio.sleep(0.2)
    await queues[0].beat([Beat(entry, "running") for entry in entries[:35]])
    found = [entry for _ in range(20) for entry in await queues[1].take_over(1, silent_s=0.15)]
    assert set(entries[35:]) <= set(found)


async def test_a_released_job_is_free_at_once_and_keeps_its_position(queues: list[JobQueue]) -> None:
    for name in ("a", "b"):
        await submit(queues[0], name)
    entries = await queues[0].read(2, 0.1)
    for entry in entries:
        await queues[0].take(entry)
    await queues[0].beat([Beat(entries[0], "running")])
    await queues[0].release(entries[0])
    assert (await queues[0].get("a"))[1] == 0
    assert await queues[1].take_over(5, silent_s=60) == entries[:1]
    assert (await queues[1].take(entries[0]))["deliveries"] == b"1"
    await queues[0].release(entries[0])  # no longer its job
    assert await queues[0].take_over(5, silent_s=60) == []


async def test_replicas_that_ended_are_forgotten_but_not_their_jobs(
    queues: list[JobQueue], redis: RedisServer
) -> None:
    def names(client: Redis) -> set[bytes]:
        return {consumer["name"] for consumer in client.xinfo_consumers("hypergen:queue", "replicas")}

    await submit(queues[0], "a")
    (entry,) = await queues[0].read(1, 0.1)
    await queues[0].take(entry)
    await queues[1].read(1, 0.01)
    with redis.client() as client:
        client.xgroup_createconsumer("hypergen:queue", "replicas", "three")
        await asyncio.sleep(0.02)
        await queues[0].forget_replicas(60)
        assert names(client) >= {b"one", b"three"}
        await queues[0].forget_replicas(0.01)
        assert names(client) == {b"one"}
    assert await queues[1].take_over(1, silent_s=0) == [entry]


async def test_a_cancelled_job_is_lost_for_its_replica(queues: list[JobQueue]) -> None:
    await submit(queues[0], "a")
    (entry,) = await queues[0].read(1, 0.1)
    await queues[0].take(entry)
    assert await queues[1].finish("a", "cancelled") == "done"
    assert await queues[0].beat([Beat(entry, "running")]) == {"a"}
    assert await queues[1].take_over(5, silent_s=0) == []


async def test_limits_count_the_jobs_of_all_replicas(queues: list[JobQueue]) -> None:
    small = with_limits(queues[0], max_jobs=2)
    await submit(queues[1], "a")
    await submit(small, "b")
    assert await submit(small, "c") == ("full", 0)
    await small.finish("a", "failed", GenerationError("x"))
    assert (await submit(small, "c"))[0] == "done"  # instead of the ended one
    assert (await small.get("a"))[0] == {}
    assert await submit(small, "d") == ("full", 0)


async def test_the_limits_of_an_api_key(queues: list[JobQueue]) -> None:
    key = ApiKey("the team", max_requests=1, images_per_minute=3)
    assert (await submit(queues[0], "a", key, n=2))[0] == "done"
    assert await submit(queues[1], "b", key) == ("key_full", 0)
    assert (await submit(queues[1], "b", ApiKey("other", max_requests=1)))[0] == "done"
    await queues[0].finish("a", "cancelled")
    outcome, seconds = await submit(queues[1], "c", key, n=2)
    assert (outcome, 55 < seconds <= 60) == ("key_rate", True)
    assert (await submit(queues[1], "c", key, n=1))[0] == "done"


async def test_the_memory_for_input_images_is_limited(queues: list[JobQueue]) -> None:
    assert (await submit(queues[0], "a", image=b"x" * 600, mask=b"x" * 600))[0] == "done"  # a single one
    assert (await submit(queues[0], "b", image=b"x"))[0] == "inputs_full"
    assert (await submit(queues[0], "c"))[0] == "done"
    await queues[0].finish("a", "cancelled")
    assert (await submit(queues[0], "b", image=b"x"))[0] == "done"


async def test_the_oldest_results_are_removed_when_images_take_too_much_memory(
    queues: list[JobQueue], redis: RedisServer
) -> None:
    for name in ("a", "b", "c"):
        await submit(queues[0], name)
        await queues[0].finish(name, "succeeded", images=b"[]", files={0: b"x" * 400})
    assert [bool((await queues[0].get(name))[0]) for name in ("a", "b", "c")] == [False, True, True]
    assert await queues[0].images("a") == {}
    with redis.client() as client:
        assert client.hget("hypergen:totals", "image_bytes") == b"800"


async def test_jobs_that_no_replica_ran_in_time_fail(queues: list[JobQueue]) -> None:
    queue = with_limits(queues[0], lifetime_s=600)
    fields = {"endpoint": b"e", "request": b"r", "created": b"1"}
    for name, late_s in (("late", 30), ("lost", 61)):
        await queue.submit(name, fields, time.time() - late_s, ANONYMOUS, 1)
    await submit(queue, "x")
    assert await state_of(queue, "late") == "queued"  # a replica that runs it ends it itself
    error = decode_error((await queue.get("lost"))[0])
    assert error
    assert (await state_of(queue, "lost"), error.code) == ("failed", "timeout")


async def test_lost_data_is_not_fatal(queues: list[JobQueue], redis: RedisServer) -> None:
    await submit(queues[0], "a")
    (entry,) = await queues[0].read(1, 0.1)
    await queues[0].take(entry)
    with redis.client() as client:
        client.flushall()
    assert await queues[0].beat([Beat(entry, "running")]) == {"a"}
    assert await queues[0].finish("a", "succeeded", images=b"[]", files={0: b"x"}) == "unknown"
    with pytest.raises(UnavailableError):
        await queues[0].read(1, 0.01)
    await queues[0].create_group()
    await submit(queues[0], "b")
    assert [entry.job_id for entry in await queues[0].read(1, 0.1)] == ["b"]


def test_every_request_can_be_stored_and_read() -> None:
    image = InputImage(2, 1, b"\x00\xffabc\x80")
    generation = make_request(
        prompt="na\u00efve \ud800",
        image=image,
        mask=InputImage(2, 1, b"\x00\xff"),
        control=ControlInput(model="canny", image=image, scale=0.1),
        loras=(("style", 0.3),),
        api_key=ApiKey("team", "high", 3),
    )
    for endpoint in ENDPOINTS:
        validated = endpoint.validated(generation, headers={"a": "b"}, ignored_fields=("x",))
        fields = encode_request(endpoint, validated)
        assert decode_request(fields) == (endpoint, validated)
        ended = {name: value for name, value in fields.items() if name in ("endpoint", "request")}
        _, without_pixels = decode_request(ended)
        assert without_pixels.generation.image == replace(image, pixels=b"")


def test_jobs_of_other_versions_are_refused() -> None:
    fields = encode_request(GENERATIONS, GENERATIONS.validated(make_request()))
    assert decode_request(fields)[0] is GENERATIONS
    for changed in (
        {**fields, "endpoint": b"/v2/images"},
        {**fields, "request": fields["request"].replace(b'{"generation"', b'{"new":1,"generation"')},
        {
            **fields,
            "request": fields["request"].replace(b'"steps"', b'"step"').replace(b'"seed":7', b'"seed":"?"'),
        },
        {**encode_request(EDITS, EDITS.validated(make_request())), "endpoint": b"/v1/image/generation"},
    ):
        with pytest.raises(UnavailableError, match="another version"):
            decode_request(changed)


def test_a_redis_that_cannot_be_used_is_an_error_at_start(tmp_path_factory: pytest.TempPathFactory) -> None:
    with start_redis(tmp_path_factory.mktemp("locked"), "--requirepass", "secret") as locked:
        address = locked.url.removeprefix("redis://")
        check_redis(f"redis://:secret@{address}")
        check_redis(f"valkey://:secret@{address}")
        for url, reason in (
            (locked.url, "Authentication required"),
            (f"redis://:wrong@{address}", "password"),
            (f"redis://:secret@{address}99", "out of range"),
            (f"redis://:secret@127.0.0.1:{free_port()}/0", "refused"),
        ):
            with pytest.raises(ConfigurationError, match=reason) as caught:
                check_redis(url)
            message = str(caught.value)
            assert message.startswith(f"jobs {without_password(url)}")
            assert "secret" not in message
            assert "\n" not in message
