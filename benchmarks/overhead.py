"""What a fork costs besides its agent: no-op forks under both executors, in one run.

Usage: python -m benchmarks.overhead [--forks 32] [--json]

Each executor runs the whole job (all seven ops, store, events, a bubblewrap sandbox for each
fork) in a process tree of its own. CPU is that of the tree and of the sandboxes, by the kernel's
accounting; memory is the largest sum of proportional set sizes of the tree, sampled.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from tests.conftest import make_repo

SAMPLE_SECONDS = 0.25
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Figures:
    """What one executor needed."""

    executor: str
    forks: int
    wall_seconds: float
    cpu_seconds: float
    peak_memory_mb: float

    @property
    def wall_ms_per_fork(self) -> float:
        """Milliseconds of wall time a fork."""
        return self.wall_seconds * 1000 / self.forks

    @property
    def cpu_ms_per_fork(self) -> float:
        """Milliseconds of CPU time a fork."""
        return self.cpu_seconds * 1000 / self.forks


def main() -> int:
    """Measure, print, and check that every fork succeeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=32)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    _adopt_orphans()
    results = [measure(name, arguments.forks) for name in ("async", "multiprocess")]
    ours, stock = results
    ratio = stock.cpu_seconds / ours.cpu_seconds
    if arguments.json:
        print(json.dumps({"results": [asdict(item) for item in results], "cpu_ratio": ratio}))
        return 0
    print(f"{platform.platform()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{arguments.forks} no-op forks, max_concurrent 8, local provider with bubblewrap\n")
    print("| executor | wall ms/fork | CPU ms/fork | peak memory MB |")
    print("|---|---|---|---|")
    for item in results:
        print(
            f"| {item.executor} | {item.wall_ms_per_fork:.0f} | {item.cpu_ms_per_fork:.0f} "
            f"| {item.peak_memory_mb:.0f} |"
        )
    print(f"\nCPU: {ratio:.1f} times less than with a process for every op")
    return 0


def measure(executor: str, forks: int) -> Figures:
    """Run the job once under an executor."""
    with tempfile.TemporaryDirectory(prefix="overhead-") as folder:
        repo = make_repo(Path(folder) / "repo")
        before = _cpu_of_children()
        began = time.monotonic()
        answer = Path(folder) / "answer.json"
        output = answer.open("wb")
        process = subprocess.Popen(
            [sys.executable, "-m", "sandbox_pipeline", "run", "--repo", str(repo), "--prompt", "p",
             "--forks", str(forks), "--max-concurrent", "8", "--command", "true", "--json",
             "--set", "rate_limit.starts=10000"],
            env={**os.environ, "DAGSTER_HOME": f"{folder}/home",
                 "SANDBOX_PIPELINE_EXECUTOR": executor},
            stdout=output,
        )  # fmt: skip
        peak = 0
        with process:
            while process.poll() is None:
                peak = max(peak, _memory(process.pid))
                time.sleep(SAMPLE_SECONDS)
        output.close()
        wall = time.monotonic() - began
        result = json.loads(answer.read_bytes())
        if result["summary"]["succeeded"] != forks:
            msg = f"{executor}: not every fork succeeded: {result['summary']}"
            raise SystemExit(msg)
        _reap_orphans()
        return Figures(executor, forks, wall, _cpu_of_children() - before, peak / 1e6)


def _adopt_orphans() -> None:
    """Become the parent of sandboxes, which their own parent leaves, so that their CPU counts."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        msg = "prctl failed; this benchmark needs Linux"
        raise SystemExit(msg)


def _reap_orphans() -> None:
    """Wait for them all; only then does the kernel count their CPU as this process's children's."""
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _memory(pid: int) -> int:
    total = 0
    try:
        root = psutil.Process(pid)
        for process in (root, *root.children(recursive=True)):
            total += process.memory_full_info().pss
    except psutil.Error:
        pass
    return total


if __name__ == "__main__":
    sys.exit(main())
