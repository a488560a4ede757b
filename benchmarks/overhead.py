"""What a fork costs besides its agent: no-op forks under both executors, in one run.

Usage: python -m benchmarks.overhead [--forks 32] [--stock-forks 32] [--runs 1] [--json]

Each run is the whole job (all seven ops, store, events, a bubblewrap sandbox for each fork) in a
process tree of its own. CPU is that of the tree and of the sandboxes. The start of the process is
in it, unless it says "further": that is the difference to a run of 4 forks.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict

from benchmarks.measuring import Figures, Row, run_job, table

WIDTH = 8
FEW = 4


def measure(forks: int, stock_forks: int, runs: int) -> tuple[list[Row], list[Figures]]:
    """Run both executors, in turn, so that what else the machine does meets both."""
    ours: list[Figures] = []
    stock: list[Figures] = []
    few: list[Figures] = []
    for _ in range(runs):
        ours.append(run_job(forks, WIDTH))
        few.append(run_job(FEW, WIDTH))
        environ = {"SANDBOX_PIPELINE_EXECUTOR": "multiprocess"}
        stock.append(run_job(stock_forks, WIDTH, environ=environ))
    further = [
        (many.cpu_seconds - less.cpu_seconds) * 1000 / (forks - FEW)
        for many, less in zip(ours, few, strict=True)
    ]
    with_start = [a.cpu_ms / b.cpu_ms for a, b in zip(stock, ours, strict=True)]
    without = [a.cpu_ms / b for a, b in zip(stock, further, strict=True)]
    theirs = f"Dagster's multiprocess executor, {stock_forks} forks"
    rows = [
        Row(f"CPU of a no-op fork, {forks} forks", "ms", [it.cpu_ms for it in ours],
            "≤ 100 ms", 100),
        Row(f"CPU of each further no-op fork ({FEW} → {forks})", "ms", further, "≤ 100 ms", 100),
        Row(f"wall of a no-op fork, {forks} forks", "ms", [it.wall_ms for it in ours]),
        Row(f"memory of the worker, {forks} forks", "MB", [it.memory_mb for it in ours]),
        Row(f"CPU of a no-op fork, {theirs}", "ms", [it.cpu_ms for it in stock]),
        Row(f"wall of a no-op fork, {theirs}", "ms", [it.wall_ms for it in stock]),
        Row(f"memory of its processes, {stock_forks} forks", "MB", [it.tree_mb for it in stock]),
        Row("its CPU a fork : ours", "x", with_start, "≥ 100 x", 100, at_least=True),
        Row("its CPU a fork : that of our further fork", "x", without),
    ]  # fmt: skip
    return rows, [*ours, *few, *stock]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=32)
    parser.add_argument("--stock-forks", type=int, default=32)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows, figures = measure(arguments.forks, arguments.stock_forks, arguments.runs)
    if arguments.json:
        medians = {row.what: statistics.median(row.values) for row in rows}
        print(json.dumps({"medians": medians, "runs": [asdict(it) for it in figures]}))
        return
    print(table(rows))


if __name__ == "__main__":
    main()
