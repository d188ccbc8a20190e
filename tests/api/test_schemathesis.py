"""Schemathesis against /openapi.json: no case crashes the server, and every response is documented.

Which cases are rejected is not checked, because a server may allow less than the documented ranges.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.live_server import LiveServer, start_server

KEY = "sk-fuzzed-key"
JSON, FORM = "application/json", "multipart/form-data"
# Phases and options. Forms have only random cases (see the hooks), and only valid ones: a form has no types,
# so invalid values are often the same bytes.
RUNS = {
    JSON: ("examples,coverage,fuzzing,stateful", ()),
    FORM: ("fuzzing", ("--include-method", "POST", "--mode", "positive")),
}

NOT_CHECKED = (
    # Limits of the server and its model are not in the schema; null means absent.
    *("positive_data_acceptance", "negative_data_rejection"),
    # The check expects that DELETE removes the resource; here it cancels a job, which can still be read.
    "use_after_free",
)

# Bodies of edits and jobs take seconds to generate.
QUICK = ("--exclude-path", "/v1/images/edits", "--exclude-path", "/v1/images/jobs")


@pytest.fixture(scope="module")
def capped(tmp_path_factory: pytest.TempPathFactory, sd_folder: Path) -> Iterator[LiveServer]:
    """A server with at most 128x128 and 4 steps."""
    limits = {"HYPERGEN_MAX_SIDE": "128", "HYPERGEN_MAX_STEPS": "4", "HYPERGEN_PRICE_RATE": "0.01"}
    arguments = (str(sd_folder), "--device", "cpu", "--dtype", "float32")
    folder = tmp_path_factory.mktemp("capped")
    with start_server(folder, *arguments, environment=limits, api_key=KEY) as server:
        yield server


def fuzz(server: LiveServer, folder: Path, bodies: str, max_examples: int, phases: str, *options: str) -> int:
    """Run schemathesis; returns the number of passed cases.

    Args:
        max_examples: random cases per operation.
    """
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"),
        *(
            "--header",
            f"Authorization: Bearer {KEY}",
            "--phases",
            phases,
            "--max-examples",
            str(max_examples),
        ),
        *("--no-color", "--continue-on-failure", "--seed", "7", "--request-timeout", "60"),
        *("--suppress-health-check", "all"),  # about slow data generation
        *("--exclude-checks", ",".join(NOT_CHECKED), *RUNS[bodies][1], *options),
    ]
    hooks = {"SCHEMATHESIS_HOOKS": "tests.api.schemathesis_hooks", "SCHEMATHESIS_BODIES": bodies}
    paths = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **hooks, "PYTHONPATH": paths}
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    found = re.search(r"(\d+) generated, (\d+) passed", run.stdout)
    assert found, run.stdout[-2000:]
    return int(found[2])


def test_a_few_cases_find_no_failure(capped: LiveServer, tmp_path: Path) -> None:
    assert fuzz(capped, tmp_path, JSON, 1, "examples,fuzzing", *QUICK) >= 10


@pytest.mark.fuzz
@pytest.mark.timeout(1800)
def test_1000_cases_find_no_failure(capped: LiveServer, tmp_path: Path) -> None:
    cases = {bodies: fuzz(capped, tmp_path, bodies, 40, phases) for bodies, (phases, _) in RUNS.items()}
    assert sum(cases.values()) >= 1000, cases
