"""The form of log lines, where a server gives no occasion to see it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from hypergen import log_setup
from tests.support.log_lines import LINE, text_fields


@pytest.fixture(autouse=True)
def _own_variable(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("_HYPERGEN_LOG", "text:info")  # restored afterwards
    token = log_setup.current_model.set("")
    yield
    log_setup.current_model.reset(token)


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.makeLogRecord({"msg": message, "levelname": "ERROR"})
    if fields:
        made.fields = fields
    return made


def failed(message: str) -> logging.LogRecord:
    made = record("It failed.")
    try:
        raise ValueError(message)
    except ValueError:
        made.exc_info = sys.exc_info()
    return made


FORGED = "x\n2026-01-01T00:00:00.000Z [http] INFO forged\r\x1b[31m\u202e\x85"


def test_a_message_or_an_exception_cannot_forge_a_line() -> None:
    formatter = log_setup.formatter("engine", "sd")
    assert LINE.fullmatch(formatter.format(record(FORGED)))
    first, *traceback = formatter.format(failed(FORGED)).split("\n")
    assert LINE.fullmatch(first)
    assert "ValueError: x" in traceback[-2]
    assert traceback[-1].startswith("  2026-01-01")
    assert all(line.startswith("  ") and line.isprintable() for line in traceback)


def test_a_value_cannot_forge_a_field() -> None:
    line = log_setup.formatter("http").format(record("GET / 200", model='a" status=500\n', n=1, size="1x1"))
    assert LINE.fullmatch(line)
    assert text_fields(line) == {"model": 'a" status=500\\n', "n": "1", "size": "1x1"}
    assert 'model="a\\" status=500\\n" n=1 size=1x1' in line


def test_json_has_the_exception_in_the_same_object() -> None:
    log_setup.export("json", "info")
    line = log_setup.formatter("engine", "sd").format(failed(FORGED))
    assert "\n" not in line
    assert line.isascii()
    parsed = json.loads(line)
    assert (parsed["level"], parsed["part"], parsed["model"]) == ("error", "engine", "sd")
    assert parsed["exception"].endswith(f"ValueError: {FORGED}")


def test_the_model_of_the_thread_names_the_line() -> None:
    formatter = log_setup.formatter("engine", "first, second")
    assert " [engine first, second] " in formatter.format(record("Starting."))
    log_setup.current_model.set("second")
    assert " [engine second] " in formatter.format(record("Loading."))
    with ThreadPoolExecutor(1) as others:
        assert " [engine first, second] " in others.submit(formatter.format, record("Reading.")).result()
