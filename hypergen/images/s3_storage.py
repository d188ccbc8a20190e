"""Object storage of images: a bucket of Amazon S3, or of another server with its API.

Credentials, region and endpoint come from the AWS_... variables, which obstore reads. URLs are presigned.

Source: https://docs.aws.amazon.com/AmazonS3/latest/API/sigv4-query-string-auth.html.
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from hypergen.errors import SettingError, UnavailableError

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig

    from hypergen.images.folder_storage import StoredImage

logger = logging.getLogger(__name__)

# The scheme of the endpoint decides; Amazon's own endpoints are https.
_CLIENT: ClientConfig = {"allow_http": True, "connect_timeout": "3s", "timeout": "20s"}
# A client waits for the response. A request that has taken as long as `retry_timeout` is not sent again.
_RETRIES: RetryConfig = {
    "max_retries": 3,
    "retry_timeout": timedelta(seconds=10),
    "backoff": {"init_backoff": timedelta(seconds=0.2), "max_backoff": timedelta(seconds=2), "base": 2},
}
_CHECK_NAME = "hypergen-check"
_RETRY_AFTER_S = 5


class S3Storage:
    """A prefix of a bucket. It is an `ImageStorage`; see there for the methods.

    Names begin with the time of expiry, so that every server of a fleet knows it. Expired images remain until
    the bucket's lifecycle rule deletes them, but have no valid URL any more.

    Args:
        address: s3://BUCKET or s3://BUCKET/PREFIX.
        lifetime_s: seconds for which an image can be fetched.
        public_url: endpoint in URLs; None: the one that the server itself uses.
    """

    def __init__(self, address: str, lifetime_s: float, public_url: str | None = None) -> None:
        self._address = address
        self._bucket, _, prefix = address.removeprefix("s3://").partition("/")
        self._prefix = prefix or None
        self._lifetime_s = lifetime_s
        self._public_url = public_url
        self._failed_at: float | None = None  # monotonic seconds; None: the last request did not fail

    @cached_property
    def _store(self) -> S3Store:
        return S3Store(self._bucket, prefix=self._prefix, client_options=_CLIENT, retry_config=_RETRIES)

    @cached_property
    def _public_store(self) -> S3Store:
        """Only signs: the host name is part of what is signed."""
        if self._public_url is None:
            return self._store
        # `aws_endpoint_url_s3` wins over both variables with an endpoint.
        return S3Store(self._bucket, prefix=self._prefix, aws_endpoint_url_s3=self._public_url)

    def check(self) -> None:
        try:
            # Not coroutines: a process that exits right after one of them may abort in obstore's threads.
            obstore.put(self._store, _CHECK_NAME, b"", use_multipart=False)
            obstore.get(self._store, _CHECK_NAME)
            obstore.sign(self._public_store, "GET", _CHECK_NAME, timedelta(seconds=1))
            return
        except (BaseError, OSError, ValueError) as error:
            reason = explain(error)
        raise SettingError(
            "storage",
            f"{self._address} cannot be written and read: {reason}. Credentials, region and endpoint come "
            "from AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL.",
        )

    def refuse_while_away(self) -> None:
        if self._failed_at is not None and time.monotonic() - self._failed_at < _RETRY_AFTER_S:
            raise _unavailable()

    async def put(self, data: bytes, extension: str, media_type: str) -> str:
        name = f"{int(time.time() + self._lifetime_s)}-{secrets.token_urlsafe(24)}.{extension}"
        try:
            # As one request, so that a failure leaves no parts behind; obstore does not copy the bytes.
            await obstore.put_async(
                self._store,
                name,
                data,
                attributes={
                    "Content-Type": media_type,
                    "Cache-Control": f"private, max-age={self._lifetime_s:.0f}, immutable",
                },
                use_multipart=False,
            )
        except (BaseError, OSError) as error:
            raise self._failed(error) from None
        self._failed_at = None
        return name

    async def url(self, name: str, base: str) -> str:
        left_s = max(1, _expires_at(name) - time.time())
        try:
            return await obstore.sign_async(self._public_store, "GET", name, timedelta(seconds=left_s))
        except BaseError as error:  # temporary credentials could not be renewed
            raise self._failed(error) from None

    async def read(self, name: str) -> bytes | None:
        if _expires_at(name) <= time.time():
            return None
        try:
            result = await obstore.get_async(self._store, name)
            return (await result.bytes_async()).to_bytes()
        except FileNotFoundError:
            return None
        except (BaseError, OSError) as error:
            raise self._failed(error) from None

    def get(self, name: str) -> StoredImage | None:
        """The server serves no file: clients fetch images from the object storage."""
        return None

    def remove_expired(self) -> None:
        """The bucket's lifecycle rule does it."""

    def close(self) -> None:
        """Images outlive the server."""

    def _failed(self, error: Exception) -> UnavailableError:
        self._failed_at = time.monotonic()
        logger.warning("The object storage %s failed: %s", self._address, explain(error))
        return _unavailable()


def _unavailable() -> UnavailableError:
    return UnavailableError(
        "The object storage of images cannot be reached; try again later.",
        code="storage_unavailable",
        retry_after_s=_RETRY_AFTER_S,
    )


def _expires_at(name: str) -> int:
    """Unix time in seconds."""
    return int(name.partition("-")[0])


def explain(error: Exception) -> str:
    """The reason of an error of obstore in one line.

    That is the code and message of S3's answer, or the cause of a failed connection. obstore's own text has
    many lines: the request, then Rust's representation of the error.
    """
    text = str(error)
    if answer := re.search(r"<Code>(\w+)</Code>\s*<Message>([^<]*)</Message>", text):
        return f"{answer[1]}: {answer[2].strip().rstrip('.')}"
    if "/latest/api/token" in text:  # the metadata of a virtual machine at Amazon, where obstore looks last
        return "no credentials"
    reason = text.partition("\n")[0].rpartition(" - ")[2].removeprefix("Generic S3 error: ").strip(" :.")
    causes = re.findall(r'(?:message|error): "([^"\n]+)"', text)
    if "source: TimedOut" in text:
        causes.append("timed out")
    return causes[-1] if causes else reason
