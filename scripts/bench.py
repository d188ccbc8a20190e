"""Measures HyperGen against stock diffusers and itself: .venv/bin/python scripts/bench.py --help."""

from hypergen.bench.__main__ import run

if __name__ == "__main__":
    run()
