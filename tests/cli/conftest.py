"""Commands run in this process, with a store of their own."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A BENTOML_HOME; BentoML reads it once per process, so its providers are overridden too."""
    home = tmp_path / "home"
    (home / "models").mkdir(parents=True)
    monkeypatch.setenv("BENTOML_HOME", str(home))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of BentoML and its dependencies at import
        import bentoml.models
        from bentoml._internal.configuration.containers import BentoMLContainer
        from bentoml._internal.models import ModelStore

    assert bentoml.models
    with (
        BentoMLContainer.bentoml_home.patch(str(home)),
        BentoMLContainer.model_store.patch(ModelStore(home / "models")),
    ):
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
