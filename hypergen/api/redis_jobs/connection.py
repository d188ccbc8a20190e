"""The connection to Redis or Valkey, and its errors in our words."""

from __future__ import annotations

import logging
from collections.abc import Generator
from contextlib import contextmanager
from urllib.parse import urlsplit

from redis import Redis as BlockingRedis
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.retry import Retry as BlockingRetry

from hypergen.errors import SettingError, UnavailableError

logger = logging.getLogger(__name__)

# Of one command. A longer one is the wait for new jobs, which is limited by the command itself.
TIMEOUT_S = 3.0
_START_TIMEOUT_S = 5.0
_CONNECTIONS = 32
_RETRY_AFTER_S = 5
# Later protocols have replies of other shapes.
_PROTOCOL = 2


def connect(url: str) -> Redis:
    """A client that opens connections when they are needed, of the event loop that uses it first."""
    pool = BlockingConnectionPool.from_url(  # pyright: ignore[reportUnknownMemberType]  untyped options
        _redis_scheme(url),
        max_connections=_CONNECTIONS,
        timeout=TIMEOUT_S,
        socket_timeout=TIMEOUT_S,
        socket_connect_timeout=TIMEOUT_S,
        # Once: a connection that was open during a restart of Redis fails at its next use.
        retry=Retry(NoBackoff(), 1),
        protocol=_PROTOCOL,
    )
    return Redis.from_pool(pool)


@contextmanager
def redis_errors() -> Generator[None]:
    """
    Raises:
        UnavailableError: instead of the errors of the client and of the connection.
    """
    try:
        yield
    except (RedisError, OSError) as error:
        if isinstance(error, ResponseError):  # it answers: full memory, a changed password, lost data
            logger.warning("Redis refused a command: %s", error)
        raise UnavailableError(
            "The job queue is away; try again later.", code="jobs_unavailable", retry_after_s=_RETRY_AFTER_S
        ) from error


def check_redis(url: str) -> None:
    """Connect once, before the server starts.

    Raises:
        SettingError: it cannot be reached, refuses the password, or is older than Redis 6.2.
    """
    where = without_password(url)
    try:
        client = BlockingRedis.from_url(  # pyright: ignore[reportUnknownMemberType]  the same
            _redis_scheme(url),
            socket_timeout=_START_TIMEOUT_S,
            socket_connect_timeout=_START_TIMEOUT_S,
            retry=BlockingRetry(NoBackoff(), 0),
            protocol=_PROTOCOL,
        )
        with client:
            answer = str(client.eval("return redis.pcall('XAUTOCLAIM').err", 0))
    except AuthenticationError as error:
        raise SettingError("jobs", f"{where}: the name or password is wrong: {_reason(error)}.") from None
    except (RedisError, OSError, ValueError) as error:
        raise SettingError("jobs", f"{where} cannot be used: {_reason(error)}.") from None
    if "nknown" in answer:  # without arguments, other versions answer that their number is wrong
        raise SettingError("jobs", f"{where} is too old: it must be Redis 6.2 or newer, or Valkey.")


def without_password(url: str) -> str:
    """The URL for messages."""
    parts = urlsplit(url)
    _, _, address = parts.netloc.rpartition("@")
    return parts._replace(netloc=address, query="").geturl()


def _redis_scheme(url: str) -> str:
    """Valkey speaks the same protocol, but the client knows only the names of Redis."""
    scheme, separator, rest = url.partition("://")
    return {"valkey": "redis", "valkeys": "rediss"}.get(scheme, scheme) + separator + rest


def _reason(error: Exception) -> str:
    return str(error).rstrip(".") or type(error).__name__
