"""API keys: which requests need one, and the check of the Authorization header."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from hypergen.errors import AuthenticationError

# Health probes. All other paths need the key, unknown ones too, except GET and HEAD of stored images.
OPEN_PATHS = frozenset({"/health", "/healthz", "/livez", "/readyz"})
FILES_PREFIX = "/v1/images/files/"


class BearerAuth:
    """Checks the Authorization header against the server's keys; without keys every request passes."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Check the key of a request.

        Raises:
            AuthenticationError: there is not exactly one Authorization header with the scheme Bearer and a
                valid key.
        """
        is_file = path.startswith(FILES_PREFIX) and method in ("GET", "HEAD")
        if not self._digests or path in OPEN_PATHS or is_file:
            return
        values = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (values[0] if len(values) == 1 else b"").partition(b" ")
        digest = _digest(key.strip(b" "))
        # Compare all digests, which have equal lengths, so that the time reveals nothing about the keys.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise AuthenticationError("Invalid API key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
