"""No regular expression of the package has nested repeats, which may take exponential time."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from re import _constants, _parser  # pyright: ignore[reportAttributeAccessIssue]  the only parser
from typing import Any

import pytest

import hypergen

ROOT = Path(hypergen.__file__).parent
FUNCTIONS = {"compile", "match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer"}
REPEATS = (_constants.MAX_REPEAT, _constants.MIN_REPEAT)


def patterns() -> Iterator[tuple[str, str]]:
    """The location and text of each literal pattern."""
    for file in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            values = [keyword.value for keyword in node.keywords if keyword.arg == "pattern"]
            function = node.func
            if (
                isinstance(function, ast.Attribute)
                and function.attr in FUNCTIONS
                and isinstance(function.value, ast.Name)
                and function.value.id == "re"
            ):
                values += node.args[:1]
            for value in values:
                text = literal(value)
                if text is not None:
                    yield f"{file.relative_to(ROOT)}:{node.lineno}", text


def literal(value: ast.expr) -> str | None:
    """The value of a string literal; in an f-string, each placeholder becomes a letter."""
    if isinstance(value, ast.JoinedStr):
        return "".join(literal(part) or "x" for part in value.values)
    return value.value if isinstance(value, ast.Constant) and isinstance(value.value, str) else None


def nests_repeats(pattern: str) -> bool:
    """Whether an unbounded repeat contains another repeat of variable length."""
    return any(
        most == _constants.MAXREPEAT and any(low != high for low, high, _ in repeats(body))
        for _, most, body in repeats(_parser.parse(pattern))
    )


def repeats(tree: Any) -> Iterator[tuple[int, int, Any]]:
    """Minimum, maximum and body of every repeat, at every depth."""
    if isinstance(tree, (list, tuple, _parser.SubPattern)):
        items = list(tree)
        if len(items) == 2 and items[0] in REPEATS:
            yield items[1]
        for item in items:
            yield from repeats(item)


@pytest.mark.parametrize(("location", "pattern"), list(patterns()))
def test_no_pattern_has_nested_repeats(location: str, pattern: str) -> None:
    assert not nests_repeats(pattern), f"{location}: {pattern}"


def test_the_patterns_are_found() -> None:
    found = dict(patterns())
    assert len(found) > 15
    assert any(location.startswith("config/") for location in found)
    assert any(location.startswith("api/multipart_form.py") for location in found)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+",
        r"(a*)*b",
        r"(a|b+)+?",
        r"(?:x(?:y|[a-z]{0,100}))*",
        r"data:[^,;]{0,100}(;[^,;]{0,100})*;base64,",
        r"(?=(a?)+)",
        r"((\s*,)\d)+",
    ],
)
def test_known_bad_patterns_are_detected(pattern: str) -> None:
    assert re.compile(pattern)
    assert nests_repeats(pattern)


@pytest.mark.parametrize("pattern", [r"a+b+", r"(ab{3})*", r"(a{0,9}/){0,7}", r"[^x]*(a|b)+", r"(.*\.)?(x)"])
def test_harmless_patterns_pass(pattern: str) -> None:
    assert not nests_repeats(pattern)
