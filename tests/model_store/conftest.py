"""Each test has its own BentoML home and a model folder to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bentoml_home import own_bentoml_home
from tests.support.model_check import check_in_this_process
from tests.support.model_folders import make_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_bentoml_home(tmp_path / "home", monkeypatch) as home:
        yield home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "My Model")


@pytest.fixture
def check_process() -> None:
    """For tests whose models are checked in a process, as they are by a server and by `hypergen import`."""


@pytest.fixture(autouse=True)
def _checks_in_this_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "check_process" not in request.fixturenames:
        check_in_this_process(monkeypatch)
