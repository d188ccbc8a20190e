"""The small model, loaded once for the tests that generate in their own process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hypergen.models import loading
from hypergen.models.family import Family
from tests.support.sync_engine import InlineEngine, make_settings


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Threads of torch as in an engine on several cores, whatever the tests run with."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def family(sd_folder: Path) -> Family:
    return loading.load(sd_folder, make_settings())


@pytest.fixture
def inline(family: Family) -> Callable[..., InlineEngine]:
    """Makes a new engine for the shared model with the given engine settings."""

    def make(**settings: Any) -> InlineEngine:
        return InlineEngine(family, **settings)

    return make
