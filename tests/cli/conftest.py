"""Commands run in this process, with a store of their own."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.bentoml_home import own_bentoml_home
from tests.support.model_check import check_in_this_process

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_bentoml_home(tmp_path / "home", monkeypatch) as home:
        yield home


@pytest.fixture
def hypergen(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command that ends by itself; returns its exit status and its standard error or, at 0, output."""
    from hypergen.cli.main import run

    def hypergen(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["hypergen", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            run()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.err if ended.value.code else captured.out

    return hypergen


@pytest.fixture(autouse=True)
def _checks_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    check_in_this_process(monkeypatch)


def entries(folder: Path) -> set[Path]:
    """All files and folders, except for the folder of the locks of imports."""
    return {path for path in folder.rglob("*") if path.name != "hypergen"}


def refuse(hypergen: Run, home: Path, arguments: list[str], words: str, *, progress: int = 0) -> None:
    """
    Args:
        progress: lines before the error's one.
    """
    work = Path.cwd()
    before = entries(home), entries(work)
    status, error = hypergen(*arguments)
    assert status == 1
    lines = error.splitlines()
    assert len(lines) == progress + 1
    assert lines[-1].startswith("Error: ")
    assert words in lines[-1]
    assert (entries(home), entries(work)) == before
