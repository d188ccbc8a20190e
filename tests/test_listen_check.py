"""The check of the port by `bentoml serve`; tests/test_bento.py runs the command."""

from __future__ import annotations

import socket

import click
import pytest
from bentoml._internal.configuration.containers import BentoMLContainer

from hypergen.bentoml_integration.listen_check import check_port_of_bentoml_serve
from hypergen.errors import ConfigurationError


@pytest.mark.parametrize("is_given", [True, False])
def test_the_port_is_the_one_of_the_command_else_bentomls(
    is_given: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, click.Context(click.Command("serve")) as context:
        host, port = other.getsockname()
        monkeypatch.setitem(BentoMLContainer.api_server_config.http.get(), "host", host)
        monkeypatch.setitem(BentoMLContainer.api_server_config.http.get(), "port", 0 if is_given else port)
        context.params = {"host": None, "port": port if is_given else None}
        with pytest.raises(ConfigurationError, match=f"port {port} cannot be used on 127.0.0.1"):
            check_port_of_bentoml_serve()


def test_other_commands_listen_nowhere() -> None:
    check_port_of_bentoml_serve()
    with click.Context(click.Command("build")):
        check_port_of_bentoml_serve()
