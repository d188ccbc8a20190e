"""Host names of this server: protection against other web sites, and the hosts allowed in `url` results."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

from hypergen.api.auth import is_public
from hypergen.config import ServerSettings
from hypergen.errors import ForbiddenError

_HOST = re.compile(r"(\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9._-]{1,255})(:[0-9]{1,5})?")


def is_own_host(host: str, server: ServerSettings) -> bool:
    """Whether a Host header names this server: the address that it listens on, loopback, any IP address,
    `allowed_host` or `public_url`.

    Any other name could be a web page that uses DNS rebinding. IP addresses cannot be rebound.
    """
    name = _name_in(host)
    return name is not None and (_is_named(name, server) or _address(name) is not None)


def is_named_host(host: str, server: ServerSettings, local_address: str | None) -> bool:
    """Whether the operator named this host, so that responses may contain it.

    As `is_own_host`, but of the IP addresses only loopback and the local address of the connection.
    """
    name = _name_in(host)
    if name is None:
        return False
    address = _address(name)
    return _is_named(name, server) or (
        address is not None and (address.is_loopback or str(address) == local_address)
    )


def reject_cross_site(
    method: str,
    path: str,
    headers: Iterable[tuple[bytes, bytes]],
    server: ServerSettings,
    origin_allowed: bool = False,
) -> None:
    """For servers without a key: reject requests that a page of another site sends through a browser.

    Args:
        origin_allowed: the operator allowed the origin of the request.

    Raises:
        ForbiddenError: the Host is not this server's, or the request comes from a page of another site.
            Other sites may show stored images, and link to the web pages.
    """
    relevant = [
        (name, value.decode("latin-1"))
        for name, value in headers
        if name in (b"host", b"origin", b"sec-fetch-site")
    ]
    hosts = [value for name, value in relevant if name == b"host"]
    if len(hosts) > 1 or not all(is_own_host(host, server) for host in hosts):
        raise ForbiddenError(
            "The Host header does not name this server. Allow it with --allowed-host or --public-url, "
            "or set an API key.",
            code="forbidden_host",
        )
    # Browsers send Sec-Fetch-Site only to https and loopback, but the Origin of a POST to every server.
    is_cross_site = (
        any(not _is_own_origin(value, hosts, server) for name, value in relevant if name == b"origin")
        or (b"sec-fetch-site", "cross-site") in relevant
    )
    if is_cross_site and not (is_public(method, path) or origin_allowed):
        raise ForbiddenError(
            "Pages of other sites cannot use this server without an API key or --cors-origin.",
            code="cross_site",
        )


def _is_own_origin(origin: str, hosts: list[str], server: ServerSettings) -> bool:
    """Whether an Origin is this server or this machine; "null" is not."""
    host = origin.partition("://")[2]
    name = _name_in(host)
    if name is None:
        return False
    address = _address(name)
    return host in hosts or _is_named(name, server) or (address is not None and address.is_loopback)


def _is_named(name: str, server: ServerSettings) -> bool:
    named = {server.host.lower(), "localhost", *server.allowed_host}
    public = urlsplit(server.public_url or "").hostname
    return name in named or name == public or name.endswith(".localhost")


def _name_in(host: str) -> str | None:
    """The host without its port; None if it is malformed."""
    match = _HOST.fullmatch(host)
    return None if match is None else match[1].strip("[]").rstrip(".").lower()


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None
