"""Types of command-line options, and which options can be combined."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

# Options for measuring the speed of one model, and options for comparing policies.
_SPEED_OPTIONS = ("only", "steps", "minutes", "profile")
_POLICY_OPTIONS = ("policies", "guidance", "only_alone")


def reject_unused(context: click.Context, *, speeds: bool, cuda: bool) -> None:
    """
    Raises:
        click.UsageError: an option was given that would have no effect.
    """
    unused = [*_POLICY_OPTIONS, *([] if cuda else ["check_gates"])] if speeds else _SPEED_OPTIONS
    for name in unused:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            if speeds:
                raise click.UsageError(f"{option} and --speeds cannot be combined.", context)
            raise click.UsageError(f"{option} needs --speeds or --device cuda.", context)


class NumberList(click.ParamType):
    """Positive numbers, separated by commas."""

    name = "numbers"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            numbers = tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers", param, ctx)
        if not all(0 < number < 100 for number in numbers):
            self.fail("loads must be above 0 and below 100", param, ctx)
        return numbers


class NameList(click.ParamType):
    """Names of a fixed set, separated by commas."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(value.split(","))
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r} is unknown; choose from {', '.join(self.known)}", param, ctx)
        return names
