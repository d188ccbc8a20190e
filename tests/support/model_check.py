"""The check of a model in this process, which has torch: a process of its own takes seconds to import it."""

from __future__ import annotations

import io
import json
import runpy
import sys
import warnings
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from hypergen.config import EngineSettings
from hypergen.model_store import model_check
from hypergen.model_store.model_check import Report
from hypergen.models.check_model import check_model
from hypergen.served_model_config import ModelOptions


def refuse_unusable(
    folder: Path, options: ModelOptions | None = None, settings: EngineSettings | None = None
) -> None:
    """As `hypergen.model_store.model_check.refuse_unusable`."""
    settings = settings or EngineSettings.model_validate({})
    check_model(folder, options or ModelOptions(), settings).refuse()


def check_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the checks of `hypergen.model_store.model_check` run their modules without a process."""
    monkeypatch.setattr(model_check, "_run", _run)


def _run(module: str, *arguments: str) -> Report:
    output = io.StringIO()
    with (
        pytest.MonkeyPatch.context() as patches,
        redirect_stdout(output),
        redirect_stderr(io.StringIO()),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        patches.setattr(sys, "argv", [module, *arguments])
        runpy.run_module(module, run_name="__main__")
    return Report(**json.loads(output.getvalue().splitlines()[-1]))
