"""Following agents' output: how long the event loop is held up, and how much gets through.

Usage: python -m benchmarks.streaming [--agents 100] [--seconds 20] [--runs 1]

The whole job runs in this process, so that its event loops can be asked how late they are: a
thread hands each one a callback every 10 ms and notes when it was called.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from benchmarks.measuring import Figures, Row, run_job, table
from tests.conftest import make_repo

STEP_SECONDS = 0.01
LETTERS = "x" * 100
LINE = '{"type":"assistant","message":{"content":[{"type":"text","text":"%s"}]}}' % ("x" * 150)


class Lateness(threading.Thread):
    """How late each event loop of this process calls back, in milliseconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.loops: dict[asyncio.AbstractEventLoop, list[tuple[float, float]]] = {}
        self.over = threading.Event()

    def run(self) -> None:
        """Ask until it is over."""
        while not self.over.wait(STEP_SECONDS):
            for loop, late in list(self.loops.items()):
                if loop.is_running():
                    asked = time.perf_counter()
                    at = time.time()
                    loop.call_soon_threadsafe(
                        lambda asked=asked, at=at, late=late: late.append(
                            (at, (time.perf_counter() - asked) * 1000)
                        )
                    )

    def worst_p99(self, begin: float = 0.0, end: float = math.inf) -> float:
        """The 99th percentile of the loop that was late most, between these moments."""
        seen = [[ms for at, ms in late if begin < at < end] for late in self.loops.values()]
        return max(statistics.quantiles(late, n=100)[98] for late in seen if len(late) > 100)


class Watched(asyncio.DefaultEventLoopPolicy):
    """Tells of every loop that is made."""

    def __init__(self, lateness: Lateness) -> None:
        super().__init__()
        self.lateness = lateness

    def new_event_loop(self) -> asyncio.AbstractEventLoop:
        """See the base."""
        loop = super().new_event_loop()
        self.lateness.loops[loop] = []
        return loop


def worst_stalls_ms(agents: int, seconds: int) -> tuple[float, float]:
    """Run the job here with so many agents that write ten lines a second each.

    Returns:
        The lateness while all of them were writing, and that of the whole run, with the start of
        all sandboxes at once and their end.
    """
    from sandbox_pipeline.cli.executing import execute
    from sandbox_pipeline.config import parse_config

    lines = seconds * 10
    writing = f"print({LINE!r}, flush=True); time.sleep(0.1)"
    program = f"import time\nfor _ in range({lines}): {writing}"
    with tempfile.TemporaryDirectory(prefix="streaming-") as folder:
        os.environ["DAGSTER_HOME"] = f"{folder}/home"
        config = parse_config(
            {
                "repo_url": str(make_repo(Path(folder) / "repo")),
                "prompt": "p",
                "num_forks": agents,
                "max_concurrent": agents,
                "agent": {"kind": "command", "command": ["python3", "-c", program]},
                "rate_limit": {"starts": 10_000},
            }
        )
        lateness = Lateness()
        asyncio.set_event_loop_policy(Watched(lateness))  # pyright: ignore[reportDeprecated]
        lateness.start()
        done = execute(config, quiet=True)
        lateness.over.set()
        succeeded = sum(fork.outcome.value == "success" for fork in done.forks)
        if succeeded != agents:
            msg = f"only {succeeded} of {agents} forks succeeded: {done.error}"
            raise SystemExit(msg)
        begin = max(fork.agent_started_at.at for fork in done.forks if fork.agent_started_at)
        end = min(fork.ended_at.at for fork in done.forks if fork.ended_at)
        streaming = lateness.worst_p99(begin.timestamp(), end.timestamp())
        return streaming, lateness.worst_p99()


def measure(agents: int = 100, seconds: int = 20, runs: int = 1) -> list[Row]:
    """Stall in a process of its own each; throughput by the wall time that the output adds."""
    stalls: list[list[float]] = []
    for _ in range(runs):
        argv = [sys.executable, "-m", "benchmarks.streaming", "--stall"]
        argv += ["--agents", str(agents), "--seconds", str(seconds)]
        told = subprocess.run(argv, check=True, stdout=subprocess.PIPE).stdout
        stalls.append([float(word) for word in told.split()])
    width, each_mb = 8, 60
    # With a key to look for in all of it, as in use.
    environ = {"ANTHROPIC_API_KEY": f"sk-ant-api03-{secrets.token_urlsafe(71)}"}
    rates: list[float] = []
    loud: list[Figures] = []
    for _ in range(runs):
        quiet = run_job(width, width, environ=environ)
        command = f"sh -c 'yes {LETTERS} | head -c {each_mb}000000'"
        loud.append(run_job(width, width, command=command, environ=environ))
        rates.append(width * each_mb / (loud[-1].wall_seconds - quiet.wall_seconds))
    return [
        Row(f"event loop's lateness while {agents} agents stream, 99th percentile", "ms",
            [while_all for while_all, _ in stalls], "≤ 50 ms", 50),
        Row(f"the same with the start of {agents} sandboxes at once, and their end", "ms",
            [whole for _, whole in stalls]),
        Row(f"output followed, {width} agents of {each_mb} MB each, in total", "MB/s", rates,
            "≥ 50 MB/s", 50, at_least=True),
        Row("memory of the worker meanwhile", "MB", [it.memory_mb for it in loud]),
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--agents", type=int, default=100)
    parser.add_argument("--seconds", type=int, default=20)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--stall", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stall:
        print(*worst_stalls_ms(arguments.agents, arguments.seconds))
        return
    print(table(measure(arguments.agents, arguments.seconds, arguments.runs)))


if __name__ == "__main__":
    main()
