"""What a fork costs besides its agent: no-op forks under both executors, in one run.

Usage: python -m benchmarks.overhead [--forks 100] [--stock-forks 8] [--runs 5] [--json]

Each run is the whole job (all seven ops, store, events, a bubblewrap sandbox for each fork) in a
process tree of its own. CPU is that of the tree and of the sandboxes; the start of the process,
about 3 s of CPU, is in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import asdict

from benchmarks.measuring import Figures, Row, run_job, table

WIDTH = 8


def measure(forks: int, stock_forks: int, runs: int) -> tuple[list[Row], list[Figures]]:
    """Run both executors, in turn, so that what else the machine does meets both."""
    ours: list[Figures] = []
    stock: list[Figures] = []
    small: list[Figures] = []
    for _ in range(runs):
        ours.append(run_job(forks, WIDTH))
        small.append(run_job(stock_forks, WIDTH))
        environ = {"SANDBOX_PIPELINE_EXECUTOR": "multiprocess"}
        stock.append(run_job(stock_forks, WIDTH, environ=environ))
    marginal = [
        (many.cpu_seconds - few.cpu_seconds) * 1000 / (forks - stock_forks)
        for many, few in zip(ours, small, strict=True)
    ]
    ratios = [theirs.cpu_ms / extra for theirs, extra in zip(stock, marginal, strict=True)]
    rows = [
        Row(f"CPU of a no-op fork, start included, {forks} forks", "ms",
            [it.cpu_ms for it in ours], "≤ 100 ms", 100),
        Row(f"CPU of each further no-op fork ({stock_forks} → {forks})", "ms", marginal,
            "≤ 100 ms", 100),
        Row(f"wall of a no-op fork, {forks} forks, width {WIDTH}", "ms",
            [it.wall_ms for it in ours]),
        Row(f"CPU of a no-op fork, Dagster's multiprocess executor, {stock_forks} forks", "ms",
            [it.cpu_ms for it in stock]),
        Row("the ratio of their CPU to that of our further fork", "x", ratios, "≥ 100 x", 100,
            at_least=True),
        Row(f"the ratio of CPU at {stock_forks} forks each, starts included", "x",
            [a.cpu_seconds / b.cpu_seconds for a, b in zip(stock, small, strict=True)]),
        Row(f"memory of the worker, {forks} forks", "MB", [it.memory_mb for it in ours]),
        Row("memory of the multiprocess tree", "MB", [it.tree_mb for it in stock]),
    ]  # fmt: skip
    return rows, [*ours, *small, *stock]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=100)
    parser.add_argument("--stock-forks", type=int, default=8)
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
