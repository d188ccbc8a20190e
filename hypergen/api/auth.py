"""The check of the Authorization header, and which requests need a key."""

from __future__ import annotations

from collections.abc import Iterable

from hypergen.api.api_keys import ApiKeys
from hypergen.errors import AuthenticationError
from hypergen.request import ANONYMOUS, ApiKey

# Health probes. All other paths need the key, unknown ones too, except GET and HEAD of stored images.
OPEN_PATHS = frozenset({"/health", "/healthz", "/livez", "/readyz"})
FILES_PREFIX = "/v1/images/files/"


class BearerAuth:
    """Checks the Authorization header against the server's keys; without keys every request passes."""

    def __init__(self, keys: ApiKeys) -> None:
        self._keys = keys

    def check(self, method: str, path: str, headers: Iterable[tuple[bytes, bytes]]) -> ApiKey:
        """The key of a request; `ANONYMOUS` where none is needed.

        Raises:
            AuthenticationError: there is not exactly one Authorization header with the scheme Bearer and a
                valid key.
        """
        is_file = path.startswith(FILES_PREFIX) and method in ("GET", "HEAD")
        if not self._keys or path in OPEN_PATHS or is_file:
            return ANONYMOUS
        values = [value for name, value in headers if name == b"authorization"]
        scheme, _, secret = (values[0] if len(values) == 1 else b"").partition(b" ")
        key = self._keys.find(secret.strip(b" "))
        if scheme.lower() != b"bearer" or key is None:
            raise AuthenticationError("Invalid API key")
        return key
