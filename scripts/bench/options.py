"""Kinds of options of the benchmarks, and which of them go together."""

from __future__ import annotations

from typing import Any

import click
from click.core import ParameterSource

# Options that say how settings for faster devices are measured, and those that say how policies are.
_OF_SPEEDS = ("variants", "steps", "minutes", "determinism")
_OF_POLICIES = ("policies", "guidance", "only_alone")


def refuse_unused(context: click.Context, *, speeds: bool, cuda: bool) -> None:
    """
    Raises:
        click.UsageError: an option was given that would do nothing.
    """
    unused = [*_OF_POLICIES, *([] if cuda else ["check_gates"])] if speeds else _OF_SPEEDS
    for name in unused:
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            option = next(p.opts[0] for p in context.command.params if p.name == name)
            together = "goes with --speeds or --device cuda" if not speeds else "does not go with --speeds"
            raise click.UsageError(f"{option} {together}.", context)


class Numbers(click.ParamType):
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
            self.fail("loads are above 0 and below 100", param, ctx)
        return numbers


class Names(click.ParamType):
    """Some of a set of names, separated by commas."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self.known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        names = value if isinstance(value, tuple) else tuple(value.split(","))
        for name in names:
            if name not in self.known:
                self.fail(f"{name!r} is none of {', '.join(self.known)}", param, ctx)
        return names
