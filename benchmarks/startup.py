"""How long people wait for the first sign of life.

Usage: python -m benchmarks.startup [--runs 5]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.measuring import Row, table
from tests.conftest import make_repo

PROGRAM = [sys.executable, "-m", "sandbox_pipeline"]


def seconds_of(*arguments: str) -> float:
    """Wall time of one command."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        began = time.monotonic()
        subprocess.run(
            [*PROGRAM, *arguments],
            env={**os.environ, "DAGSTER_HOME": folder},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        return time.monotonic() - began


def seconds_to_first_byte() -> float:
    """From the start of `run` in a new home to when the agent writes its first byte."""
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        repo = make_repo(Path(folder) / "repo")
        began = time.time()
        subprocess.run(
            [*PROGRAM, "run", "--repo", str(repo), "--prompt", "p", "--forks", "1", "--json",
             "--workflow-id", "first", "--command", "date +%s.%N"],
            env={**os.environ, "DAGSTER_HOME": f"{folder}/home"},
            stdout=subprocess.DEVNULL,
            check=True,
        )  # fmt: skip
        written = Path(folder, "home", "artifacts", "first", "fork_000", "stdout.log")
        return float(written.read_text().split()[0]) - began


def measure(runs: int = 5) -> list[Row]:
    """The three waits."""
    return [
        Row("`sandbox-pipeline --help`", "s", [seconds_of("--help") for _ in range(runs)],
            "≤ 0.4 s", 0.4),
        Row("`sandbox-pipeline doctor`", "s", [seconds_of("doctor") for _ in range(runs)],
            "≤ 2 s", 2),
        Row("start of `run` to the agent's first byte, local, new home", "s",
            [seconds_to_first_byte() for _ in range(runs)], "≤ 4 s", 4),
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=5)
    print(table(measure(parser.parse_args().runs)))


if __name__ == "__main__":
    main()
