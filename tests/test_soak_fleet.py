"""A short run of `scripts.soak_fleet`: a replica is killed while it runs jobs, and none is lost."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("redis-server") is None, reason="redis-server is not installed")
def test_no_job_is_lost_when_a_replica_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "scripts.soak_fleet", "--jobs", "30", "--replicas", "2", "--kills", "1"]
    command += ["--steps", "20", "--folder", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stdout + run.stderr
    rows = [line.split("|")[1:3] for line in run.stdout.splitlines() if line.startswith("| ")]
    figures = {what.strip(): result.strip() for what, result in rows}
    assert figures["jobs with a result"] == "30"
    assert figures["replicas killed"] == "1"
    assert int(figures["jobs taken over"]) >= 1
