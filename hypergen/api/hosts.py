"""Which names this server goes by: what a web page may not do through a browser, and whose name stands in
`url` results.
"""

from __future__ import annotations

import ipaddress
import re
from urllib.parse import urlsplit

from hypergen.config import ServerSettings

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(:[0-9]{1,5})?")


def is_own_host(host: str, server: ServerSettings) -> bool:
    """Whether a Host header names this server: as the address that it listens on, loopback, any IP address,
    `allowed_host` or `public_url`. Names of others would let a web page reach it by DNS rebinding, and
    addresses can not be rebound.
    """
    match = _HOST.fullmatch(host)
    if match is None:
        return False
    name = match[1].strip("[]").rstrip(".").lower()
    known = {server.host, "localhost", *server.allowed_host}
    if server.public_url:
        known.add(urlsplit(server.public_url).hostname or "")
    return name in {entry.lower() for entry in known} or name.endswith(".localhost") or _is_address(name)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
