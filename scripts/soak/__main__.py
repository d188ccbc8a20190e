"""What the server withstands: hostile inputs, floods, clients that hang up, kills, growth, and a drain.

    python -m scripts.soak                 # prints the table of docs/reliability.md
    python -m scripts.soak --requests 200  # a short run

It serves the embedded model in a process of its own. The exit code is 1 if a promise is not kept.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from scripts.bench import report
from scripts.bench.servers import serve
from scripts.soak.phases import PHASES, Soak


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=1000, help="of the phase that measures growth")
    parser.add_argument("--minutes", type=float, default=20, help="after which no further phase starts")
    options = parser.parse_args()
    console = Console(soft_wrap=True)
    environment = report.environment(["python", "-m", "scripts.soak", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        keys = folder / "keys"
        keys.write_text("soak: sk-soak\n", encoding="utf-8")
        arguments = ("--api-key-file", str(keys), "--device", "cpu", "--max-queue-size", "20")
        with serve(folder, *arguments) as server:
            server.wait_for()
            soak = Soak(server, "sk-soak", options.requests)
            soak.wait_until_healthy()
            for phase in PHASES:
                if soak.elapsed_s > options.minutes * 60:
                    console.print(f"Not run for lack of time: {phase.__name__}.")
                    continue
                with console.status(phase.__name__.replace("_", " ")):
                    phase(soak)
    console.print(
        f"{environment['machine']}, {environment['date']}, `{environment['command']}`\n", highlight=False
    )
    console.print("| what | result | promised | |\n|---|---|---|---|", highlight=False)
    for figure in soak.figures:
        mark = "" if figure.is_kept else "**not kept**"
        console.print(f"| {figure.what} | {figure.result} | {figure.promised} | {mark} |", highlight=False)
    return 0 if all(figure.is_kept for figure in soak.figures) else 1


if __name__ == "__main__":
    sys.exit(main())
