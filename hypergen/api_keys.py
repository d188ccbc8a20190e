"""The bearer keys of a server, from its settings and a file."""

from __future__ import annotations

from hypergen.config import ServerSettings
from hypergen.errors import ConfigurationError


def api_keys(server: ServerSettings) -> tuple[str, ...]:
    """The keys that open the server; none means no authentication.

    Raises:
        ConfigurationError: the key file cannot be read or holds no key.
    """
    keys = [server.api_key] if server.api_key else []
    if server.api_key_file:
        try:
            lines = server.api_key_file.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"The key file {server.api_key_file} cannot be read: {error}.") from None
        found = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not found:
            raise ConfigurationError(f"The key file {server.api_key_file} holds no key.")
        keys += found
    return tuple(keys)
