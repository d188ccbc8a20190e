"""Bearer keys: which requests need one, and whether it is right."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Sequence

from hypergen.errors import AuthenticationError

# Probes and picture addresses. Everything else needs the key, also what has no route.
OPEN_PATHS = frozenset({"/health", "/healthz", "/livez", "/readyz"})
FILES_PREFIX = "/v1/images/files/"


class BearerAuth:
    """Checks the Authorization header against the server's keys; without keys everybody may come in."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def check(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """Let a request pass.

        Raises:
            AuthenticationError: there is not exactly one Authorization header with the scheme Bearer and a
                right key.
        """
        is_file = path.startswith(FILES_PREFIX) and method in ("GET", "HEAD")
        if not self._digests or path in OPEN_PATHS or is_file:
            return
        given = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (given[0] if len(given) == 1 else b"").partition(b" ")
        digest = _digest(key.strip(b" "))
        # Digests of equal length, all of them compared: the time tells nothing about the keys.
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        if scheme.lower() != b"bearer" or not any(matches):
            raise AuthenticationError("Invalid API key")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
