"""`--help` of the commands with many options."""

from __future__ import annotations

from collections import Counter

import pytest
from click.testing import CliRunner

from hypergen.cli.grouped_help import OTHER, USUAL, GroupedCommand
from hypergen.cli.main import main
from hypergen.setting_names import fields


@pytest.mark.parametrize("name", ["serve", "generate"])
def test_every_option_is_once_in_the_help_and_in_a_named_group(name: str) -> None:
    command = main.commands[name]
    assert isinstance(command, GroupedCommand)
    lines = CliRunner().invoke(main, [name, "--help"]).output.splitlines()
    shown = Counter(line.split()[0].rstrip(",") for line in lines if line.startswith("  -"))
    context = main.make_context("hypergen", [name, "--help"], resilient_parsing=True)
    options = [
        parameter for parameter in command.get_params(context) if parameter.param_type_name == "option"
    ]
    assert shown == Counter(option.opts[0] for option in options)
    titles = [line for line in lines if line.endswith(":") and not line.startswith(" ")]
    assert titles == [f"{title}:" for title in (*command.groups, OTHER)]
    assert titles[0] == f"{USUAL}:"
    others = lines[lines.index(f"{OTHER}:") + 1 :]
    assert [line.split()[0] for line in others] == ["-h,"]  # all others are in a named group
    assert len(command.groups[USUAL]) == 10


def test_every_setting_is_an_option_of_serve() -> None:
    settings = {name for _, name, _ in fields()} - {"models"}
    assert settings <= {parameter.name for parameter in main.commands["serve"].params}
