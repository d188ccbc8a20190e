"""A BENTOML_HOME of a test's own."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def own_bentoml_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """BentoML reads the variable once per process, so its providers are overridden too."""
    (home / "models").mkdir(parents=True)
    monkeypatch.setenv("BENTOML_HOME", str(home))
    monkeypatch.setenv("BENTOML_DO_NOT_TRACK", "True")
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
