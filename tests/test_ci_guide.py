"""The example of docs/ci.md, run unchanged but for its port."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.support.live_server import free_port

_GUIDE = (Path(__file__).parents[1] / "docs" / "ci.md").read_text(encoding="utf-8")


def test_the_fixture_of_the_guide_serves_its_test(tmp_path: Path) -> None:
    for name, code in re.findall(r"```python\n# (\w+\.py)\n(.*?)```", _GUIDE, re.DOTALL):
        (tmp_path / name).write_text(code.replace("8123", str(free_port())))
    assert {path.name for path in tmp_path.iterdir()} == {"conftest.py", "test_images.py"}
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "BENTOML_HOME": str(tmp_path / "bentoml"),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed" in result.stdout
