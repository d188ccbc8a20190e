"""Each test has its own BentoML home and a model folder to import."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.bentoml_home import own_bentoml_home
from tests.support.model_folders import make_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with own_bentoml_home(tmp_path / "home", monkeypatch) as home:
        yield home


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_model(tmp_path / "My Model")
