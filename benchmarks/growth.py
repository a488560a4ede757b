"""How the cost of a fork grows with their number: 10, 50, 200 and 1,000 no-op forks in one run.

Usage: python -m benchmarks.growth [--forks 10 50 200 1000] [--runs 1] [--picture FILE.svg]

Afterwards the UI is asked for the largest run, as its page does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from benchmarks.measuring import Figures, Row, run_job, table

FORKS = (10, 50, 200, 1000)
WIDTH = 8
UI_SECONDS = 120
# What the run's page asks for first: the run with its steps, and a page of its log.
RUN_PAGE = """
query Page($run: ID!) {
  runOrError(runId: $run) { ... on Run { status stepStats { stepKey status } } }
  logsForRun(runId: $run, limit: 1000) { ... on EventConnection { hasMore events { __typename } } }
}
"""


def measure(sizes: tuple[int, ...] = FORKS, runs: int = 1) -> tuple[list[Row], dict[int, Figures]]:
    """One row a size; the last run's figures."""
    found: dict[int, list[Figures]] = {size: [] for size in sizes}
    opened: list[float] = []
    for _ in range(runs):
        for size in sizes:
            with tempfile.TemporaryDirectory(prefix="growth-") as folder:
                found[size].append(run_job(size, WIDTH, home=Path(folder)))
                if size == max(sizes):
                    opened.append(seconds_to_open(Path(folder)))
    rows = [
        Row(f"CPU of a fork, {size} forks", "ms", [it.cpu_ms for it in found[size]])
        for size in sizes
    ]
    rows += [
        Row(f"memory of the worker, {size} forks", "MB", [it.memory_mb for it in found[size]])
        for size in sizes
    ]
    most, few = max(sizes), 50
    if few in sizes and most > few:
        ratios = [a.cpu_ms / b.cpu_ms for a, b in zip(found[most], found[few], strict=True)]
        rows.append(
            Row(f"CPU of a fork at {most} against {few}, starts included", "x", ratios,
                "≤ 1.2 x", 1.2)
        )  # fmt: skip
        marginal = [
            (a.cpu_seconds - b.cpu_seconds) * 1000 / (most - few)
            for a, b in zip(found[most], found[few], strict=True)
        ]
        rows.append(Row(f"CPU of each further fork ({few} → {most})", "ms", marginal))
    rows.append(
        Row(f"the UI's server answers for the run of {most} forks", "s", opened, "opens", 30)
    )
    return rows, {size: figures[-1] for size, figures in found.items()}


def seconds_to_open(home: Path) -> float:
    """Time of the answer to what the run's page asks for; of the second request, when warm."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    argv = [sys.executable, "-m", "sandbox_pipeline", "ui", "--port", str(port)]
    log = (home / "ui.log").open("wb")
    with (
        log,
        subprocess.Popen(
            argv,
            env={**os.environ, "DAGSTER_HOME": str(home)},
            stdout=log,
            stderr=log,
            start_new_session=True,
        ) as ui,
    ):
        try:
            url = f"http://127.0.0.1:{port}/graphql"
            deadline = time.monotonic() + UI_SECONDS
            while True:
                try:
                    runs = _ask(url, "{ runsOrError { ... on Runs { results { runId } } } }", {})
                    break
                except OSError:
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(0.5)
            run = runs["data"]["runsOrError"]["results"][0]["runId"]
            _ask(url, RUN_PAGE, {"run": run})
            began = time.monotonic()
            page = _ask(url, RUN_PAGE, {"run": run})
            seconds = time.monotonic() - began
            if page["data"]["runOrError"]["status"] != "SUCCESS":
                msg = f"the UI says {str(page)[:500]}"
                raise SystemExit(msg)
            return seconds
        finally:
            ui.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                ui.wait(10)
            # Left over, its servers would be waited for by the next run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(ui.pid, signal.SIGKILL)


def _ask(url: str, query: str, variables: dict[str, str]) -> dict[str, Any]:
    body = json.dumps({"query": query, "variables": variables}).encode()
    request = urllib.request.Request(url, body, {"content-type": "application/json"})  # noqa: S310
    with urllib.request.urlopen(request, timeout=UI_SECONDS) as answer:  # noqa: S310
        return json.load(answer)


def picture(figures: dict[int, Figures]) -> str:
    """The cost of a fork by their number, as SVG."""
    left, top, width, height = 60, 30, 560, 240
    most = max(it.cpu_ms for it in figures.values()) * 1.15
    sizes = sorted(figures)
    xs = {size: left + width * (i + 0.5) / len(sizes) for i, size in enumerate(sizes)}
    bars: list[str] = []
    for size in sizes:
        value = figures[size].cpu_ms
        tall = height * value / most
        bars.append(
            f'<rect x="{xs[size] - 40:.0f}" y="{top + height - tall:.0f}" width="80" '
            f'height="{tall:.0f}" fill="#3b82f6"/>'
            f'<text x="{xs[size]:.0f}" y="{top + height - tall - 6:.0f}">{value:.0f} ms</text>'
            f'<text x="{xs[size]:.0f}" y="{top + height + 20}">{size:,} forks</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} '
        f'{top + height + 40}" font-family="sans-serif" font-size="13" text-anchor="middle">'
        f'<rect width="100%" height="100%" fill="#ffffff"/>'
        f'<text x="{left + width / 2:.0f}" y="18">CPU of a no-op fork by the number of forks in '
        f"one run, start of the process included</text>"
        f'<line x1="{left}" y1="{top + height}" x2="{left + width}" y2="{top + height}" '
        f'stroke="#64748b"/>{"".join(bars)}</svg>\n'
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, nargs="+", default=FORKS)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--picture", type=Path)
    arguments = parser.parse_args()
    rows, figures = measure(tuple(arguments.forks), arguments.runs)
    print(table(rows))
    if arguments.picture is not None:
        arguments.picture.write_text(picture(figures), encoding="utf-8")


if __name__ == "__main__":
    main()
