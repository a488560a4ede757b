"""Many live forks: wall time over the E2B wire server, paid idle time, memory of the worker.

Usage: python -m benchmarks.many_at_once [--forks 100] [--agent-seconds 60] [--runs 1]
       python -m benchmarks.many_at_once --memory [--live 200 400]

Against the test server, which runs a real process for each sandbox; hosted E2B has its own
figures. The rate limit is the default: 5 creations a second.
"""

from __future__ import annotations

import argparse

from benchmarks.measuring import Figures, Row, run_job, table
from tests.servers.e2b_server import E2BServer

CREATES_PER_SECOND = 5


def measure_wall(forks: int = 100, agent_seconds: int = 60, runs: int = 1) -> list[Row]:
    """All forks at once, each with an agent that takes so long."""
    found: list[Figures] = []
    for _ in range(runs):
        with E2BServer() as server:
            found.append(
                run_job(
                    forks,
                    forks,
                    command=f"sleep {agent_seconds}",
                    environ=server.environ,
                    options=[
                        "--set",
                        "sandbox.provider=e2b",
                        "--set",
                        f"rate_limit.starts={CREATES_PER_SECOND}",
                    ],
                )
            )
    creation = forks / CREATES_PER_SECOND
    limit = 1.05 * agent_seconds + creation
    target = f"≤ 1.05 x {agent_seconds} s + {creation:.0f} s"
    idle = [100 * it.summary["paid_idle_seconds"] / (forks * agent_seconds) for it in found]
    return [
        Row(f"wall of {forks} forks of {agent_seconds} s, width {forks}, E2B wire server", "s",
            [it.wall_seconds for it in found], target, limit),
        Row(f"paid idle, agents of {agent_seconds} s, share of agent-seconds", "%", idle,
            "≤ 2 %", 2),
        Row(f"memory of the worker, {forks} live forks over the wire", "MB",
            [it.live_mb for it in found]),
    ]  # fmt: skip


def measure_memory(live: tuple[int, ...] = (200, 400), runs: int = 1) -> list[Row]:
    """The worker's memory while so many local sandboxes have an agent at work."""
    rows: list[Row] = []
    found: dict[int, list[float]] = {}
    for count in live:
        # Long enough for all to be alive at once.
        seconds = 15 + count // 8
        runs_of = [run_job(count, count, command=f"sleep {seconds}") for _ in range(runs)]
        found[count] = [it.live_mb for it in runs_of]
        target, limit = ("≤ 250 MB", 250.0) if count == 200 else ("", None)
        rows.append(Row(f"memory of the worker, {count} live forks", "MB", found[count], target,
                        limit))  # fmt: skip
        rows.append(Row(f"memory of the worker at the end of {count} forks, with their tables",
                        "MB", [it.memory_mb for it in runs_of]))  # fmt: skip
    if len(live) > 1:
        few, many = live[0], live[-1]
        further = [(b - a) / (many - few) for a, b in zip(found[few], found[many], strict=True)]
        rows.append(Row(f"memory of each further live fork ({few} → {many})", "MB", further,
                        "≤ 0.5 MB", 0.5))  # fmt: skip
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=100)
    parser.add_argument("--agent-seconds", type=int, default=60)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--live", type=int, nargs="+", default=(200, 400))
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.memory:
        print(table(measure_memory(tuple(arguments.live), arguments.runs)))
        return
    print(table(measure_wall(arguments.forks, arguments.agent_seconds, arguments.runs)))


if __name__ == "__main__":
    main()
