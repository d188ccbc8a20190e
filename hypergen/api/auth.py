"""The check of the Authorization header, and which requests need a key."""

from __future__ import annotations

from collections.abc import Iterable

from hypergen.api.api_keys import ApiKeys
from hypergen.errors import AuthenticationError
from hypergen.request import ANONYMOUS, ApiKey

# Health probes. All other paths need the key, unknown ones too, except `is_public` ones.
OPEN_PATHS = frozenset({"/health", "/healthz", "/livez", "/readyz"})
FILES_PREFIX = "/v1/images/files/"
_PUBLIC_PATHS = frozenset({"/", "/docs", "/openapi.json"})
_PUBLIC_PREFIXES = (FILES_PREFIX, "/playground/", "/docs/")


def is_public(method: str, path: str) -> bool:
    """Whether a request is for a stored image, whose name cannot be guessed, or for a web page or the
    description of the API, which are the same on every server of a version.

    It needs no key, and links of other sites may lead to it.
    """
    return method in ("GET", "HEAD") and (path in _PUBLIC_PATHS or path.startswith(_PUBLIC_PREFIXES))


class BearerAuth:
    """Checks the Authorization header against the server's keys; without keys every request passes."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def check(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> ApiKey:
        """The key of a request; `ANONYMOUS` without keys, and where a path needs none.

        Raises:
            AuthenticationError: there is not exactly one Authorization header with the scheme Bearer and a
                valid key.
        """
        if not self._keys or is_public(method, path):
            return ANONYMOUS
        values = [value for name, value in headers if name == b"authorization"]
        scheme, _, secret = (values[0] if len(values) == 1 else b"").partition(b" ")
        key = self._keys.find(secret.strip(b" "))
        if scheme.lower() == b"bearer" and key is not None:
            return key
        if path in OPEN_PATHS:
            return ANONYMOUS
        raise AuthenticationError("Invalid API key")
