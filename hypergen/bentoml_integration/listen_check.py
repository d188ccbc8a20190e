"""A check before the server starts that it can listen on its address: BentoML would end with a traceback."""

from __future__ import annotations

import errno
import socket

import click
from bentoml._internal.configuration.containers import BentoMLContainer

from hypergen.errors import SettingError


def check_port(host: str, port: int) -> int:
    """Check before the model is loaded that the server can listen on its address; returns the port.

    Raises:
        SettingError: the port is in use, or the host is no address of this machine.
    """
    try:
        family, socket_type, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket_type, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
            bound: int = probe.getsockname()[1]
            return bound
    except OSError as error:
        if isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL:
            raise SettingError("host", f"{host} cannot be used: {error.strerror}.") from None
        raise SettingError("port", f"{port} cannot be used on {host}: {error.strerror}.") from None


def check_port_of_bentoml_serve() -> None:
    """`check_port` with the address of the running command `bentoml serve`; nothing for other commands.

    Raises:
        SettingError: as `check_port`.
    """
    context = click.get_current_context(silent=True)
    if context is not None and {"host", "port"} <= context.params.keys():
        http = BentoMLContainer.http
        host, port = context.params["host"], context.params["port"]
        check_port(http.host.get() if host is None else host, http.port.get() if port is None else port)
