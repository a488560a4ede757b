"""All benchmarks, written to benchmarks/results.md: `make bench`.

Usage: python -m benchmarks [--runs 5] [--growth-runs 5] [--output benchmarks/results.md]

Takes about an hour of an otherwise idle machine, a third of which is the growth to 1,000 forks.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

import psutil

from benchmarks import growth, many_at_once, overhead, startup, streaming
from benchmarks.measuring import Row, table

HERE = Path(__file__).parent
PICTURE = HERE.parent / "docs" / "images" / "growth.svg"
LOOP_ROUNDS = 10_000_000
PACKAGES = ("sandbox-pipeline", "dagster", "dagster-async-executor", "e2b", "sqlalchemy")


def machine() -> str:
    """Where and with what it was measured."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace").splitlines()
    model = next((line.split(":", 1)[1].strip() for line in lines if "model name" in line), "?")
    memory = psutil.virtual_memory().total / 1e9
    versions = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    bwrap = shutil.which("bwrap")
    if bwrap is not None:
        said = subprocess.run([bwrap, "--version"], check=True, capture_output=True, text=True)
        versions.append(said.stdout.strip())
    return (
        f"{datetime.datetime.now(tz=datetime.UTC):%Y-%m-%d}, {os.cpu_count()} cores of {model}, "
        f"{memory:.0f} GB, {platform.platform()}, Python {platform.python_version()}; "
        f"{', '.join(versions)}. Load before: {os.getloadavg()[0]:.1f}. "
        f"Speed: a Python loop of {LOOP_ROUNDS:,} rounds takes {seconds_of_a_loop():.2f} s."
    )


def seconds_of_a_loop() -> float:
    """CPU seconds of a plain loop: machines of the same kind differ by half, and so do figures."""
    began = time.process_time()
    total = 0
    for number in range(LOOP_ROUNDS):
        total += number * number % 7
    return time.process_time() - began


def main() -> None:
    """Measure everything; what is done is written at once."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--growth-runs", type=int, help="as --runs, if left out")
    parser.add_argument("--output", type=Path, default=HERE / "results.md")
    arguments = parser.parse_args()
    runs = arguments.runs
    where = machine()
    rows: list[Row] = []

    def keep(new: list[Row]) -> None:
        rows.extend(new)
        print(table(new), flush=True)
        arguments.output.write_text(
            f"# Results of `make bench`\n\n{where}\n\nOne process tree a run; CPU by the kernel's "
            "control groups, so that what ran inside sandboxes counts. "
            "Memory is the proportional set size of the run's worker.\n\n"
            f"{table(rows)}\n",
            encoding="utf-8",
        )

    keep(startup.measure(runs))
    keep(overhead.measure(100, 8, runs)[0])
    keep(streaming.measure(runs=runs))
    keep(many_at_once.measure_memory(runs=runs))
    keep(many_at_once.measure_wall(runs=runs))
    grown, figures = growth.measure(runs=arguments.growth_runs or runs)
    keep(grown)
    PICTURE.write_text(growth.picture(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
