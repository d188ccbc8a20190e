"""Writes requirements.txt: what a Bento installs, with the versions of constraints.txt.

    .venv/bin/python scripts/make_requirements.py

These are the packages that pyproject.toml names, those of the extras that a server in an image may use, and
those that they need, without the development tools.
"""

from __future__ import annotations

import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import click
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
FILE = ROOT / "requirements.txt"
EXTRAS = ("redis", "s3")
HEADER = "# Made by scripts/make_requirements.py from constraints.txt: the packages of a Bento.\n"


def runtime_packages(requirements: list[str]) -> set[str]:
    """Canonical names of these packages and of all that they need in this environment, as installed in it."""
    found: set[str] = set()
    seen: set[tuple[str, str]] = set()
    pending = [(Requirement(text), "") for text in requirements]
    while pending:
        requirement, extra = pending.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = canonicalize_name(requirement.name)
        found.add(name)
        for wanted in requirement.extras | {""}:
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                pending += [(Requirement(text), wanted) for text in distribution(name).requires or ()]
    return found


def make_requirements() -> str:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    optional = [text for extra in EXTRAS for text in project["optional-dependencies"][extra]]
    packages = runtime_packages(project["dependencies"] + optional)
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {canonicalize_name(line.partition("==")[0]): line for line in lines if "==" in line}
    missing = packages - pins.keys()
    if missing:
        sys.exit(f"constraints.txt has no version of {', '.join(sorted(missing))}.")
    return HEADER + "".join(f"{pin}\n" for name, pin in pins.items() if name in packages)


@click.command()
def main() -> None:
    """Write requirements.txt: what a Bento installs, with the versions of constraints.txt."""
    FILE.write_text(make_requirements(), encoding="utf-8")


if __name__ == "__main__":
    main()
