"""How the benchmarks measure: one process tree a run, its CPU by the kernel's own accounting."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from tests.conftest import make_repo

SAMPLE_SECONDS = 0.25
PR_SET_CHILD_SUBREAPER = 36
CPUACCT = Path("/sys/fs/cgroup/cpuacct")
UNIFIED = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Row:
    """One line of the results.

    Attributes:
        what: was measured.
        unit: of the values.
        values: one a run.
        target: in words.
        limit: the target as a number, of the median; None: nothing to hold.
        at_least: whether the median must be above the limit instead of below.
    """

    what: str
    unit: str
    values: Sequence[float]
    target: str = ""
    limit: float | None = None
    at_least: bool = False

    @property
    def median(self) -> float:
        """Median of the runs."""
        return statistics.median(self.values)

    @property
    def verdict(self) -> str:
        """Whether the target holds."""
        if self.limit is None:
            return ""
        met = self.median >= self.limit if self.at_least else self.median <= self.limit
        return "yes" if met else "**no**"

    def markdown(self) -> str:
        """The line of the table."""
        spread = f"{_short(min(self.values))} to {_short(max(self.values))}"
        return (
            f"| {self.what} | {self.target} | {_short(self.median)} {self.unit} | {spread} "
            f"| {len(self.values)} | {self.verdict} |"
        )


HEADER = "| what | target | median | min to max | runs | holds |\n|---|---|---|---|---|---|"


def table(rows: Sequence[Row]) -> str:
    """The rows as a Markdown table."""
    return "\n".join([HEADER, *(row.markdown() for row in rows)])


def _short(value: float) -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 3
    return f"{value:.{digits}f}"


@dataclass(frozen=True)
class Figures:
    """What one run of the whole job needed.

    Attributes:
        wall_seconds: from the start of the process to its end.
        cpu_seconds: of all processes, those inside of sandboxes included.
        memory_mb: largest proportional set size of the run's worker, its children not counted.
        live_mb: the same until the first fork ended.
        tree_mb: that of the worker with all its children, at most.
        summary: what the job said of itself.
    """

    forks: int
    wall_seconds: float
    cpu_seconds: float
    memory_mb: float
    live_mb: float
    tree_mb: float
    summary: Mapping[str, Any]

    @property
    def cpu_ms(self) -> float:
        """Milliseconds of CPU a fork."""
        return self.cpu_seconds * 1000 / self.forks

    @property
    def wall_ms(self) -> float:
        """Milliseconds of wall time a fork."""
        return self.wall_seconds * 1000 / self.forks


def job_argv(repo: Path, forks: int, width: int, command: str = "true") -> list[str]:
    """The command line of the whole job, without a rate limit that would be felt."""
    return [
        sys.executable, "-m", "sandbox_pipeline", "run", "--repo", str(repo),
        "--prompt", "p", "--forks", str(forks), "--max-concurrent", str(width),
        "--command", command, "--json", "--set", "rate_limit.starts=10000",
    ]  # fmt: skip


def run_job(
    forks: int,
    width: int,
    *,
    command: str = "true",
    environ: Mapping[str, str] | None = None,
    options: Sequence[str] = (),
    home: Path | None = None,
) -> Figures:
    """Run `sandbox-pipeline run` in a process tree of its own, with all ops and a real store.

    Args:
        forks: how many.
        width: `max_concurrent`.
        command: the agent's, run inside each sandbox.
        environ: added to this process's.
        options: further ones of the command line.
        home: DAGSTER_HOME; a new one for each run if left out.

    Raises:
        SystemExit: not every fork succeeded; a figure would mean nothing.
    """
    with tempfile.TemporaryDirectory(prefix="benchmark-") as folder, cpu_of_a_tree() as cpu:
        repo = make_repo(Path(folder) / "repo")
        answer = Path(folder) / "answer.json"
        argv = [*job_argv(repo, forks, width, command), *options]
        began = time.monotonic()
        with answer.open("wb") as output:
            process = cpu.start(
                argv,
                env={
                    **os.environ,
                    "DAGSTER_HOME": str(home or f"{folder}/home"),
                    **(environ or {}),
                },
                stdout=output,
            )
        seen, tree = _watch_memory(process)
        wall = time.monotonic() - began
        text = answer.read_text() or '{"summary": {}, "error": "no answer"}'
        result: dict[str, Any] = json.loads(text)
        if result["summary"].get("succeeded") != forks:
            msg = f"{forks} forks: not every one succeeded: {result}"[:2000]
            raise SystemExit(msg)
        first_end = min(datetime.fromisoformat(it["ended_at"]) for it in result["forks"])
        return Figures(
            forks=forks,
            wall_seconds=wall,
            cpu_seconds=cpu.seconds(),
            memory_mb=max(own for _, own in seen) / 1e6,
            live_mb=max(own for at, own in seen if at < first_end.timestamp()) / 1e6,
            tree_mb=tree / 1e6,
            summary=result["summary"],
        )


class TreeCpu:
    """CPU time of what `start` starts and of all that descends from it.

    By a control group where one can be made, since the kernel forgets what processes used that
    die with their process namespace, as everything in a sandbox does; else by what parents hear
    of their children, which is less.
    """

    def __init__(self) -> None:
        self._group: Path | None = None
        for parent in (CPUACCT, UNIFIED):
            group = parent / f"benchmark-{os.getpid()}-{time.monotonic_ns():x}"
            with contextlib.suppress(OSError):
                group.mkdir()
                if (group / self._file(group)).exists():
                    self._group = group
                    break
                group.rmdir()
        self._before = _cpu_of_children()

    @property
    def is_exact(self) -> bool:
        """Whether it counts all."""
        return self._group is not None

    def start(
        self,
        argv: Sequence[str],
        *,
        env: Mapping[str, str],
        stdout: BinaryIO,
        stderr: BinaryIO | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process that counts; what it says goes to the terminal, or to `stderr`."""
        if self._group is not None:
            join = f'echo $$ > {self._group}/cgroup.procs && exec "$@"'
            argv = ["sh", "-c", join, "sh", *argv]
        return subprocess.Popen(argv, env=env, stdout=stdout, stderr=stderr)

    def seconds(self) -> float:
        """What they used, once all have ended."""
        _reap_orphans()
        if self._group is None:
            return _cpu_of_children() - self._before
        while (self._group / "cgroup.procs").read_text().strip():
            time.sleep(0.02)
        text = (self._group / self._file(self._group)).read_text()
        if self._group.parent == CPUACCT:
            return int(text) / 1e9
        return int(text.split()[1]) / 1e6

    def close(self) -> None:
        """Remove the group."""
        if self._group is not None:
            with contextlib.suppress(OSError):
                self._group.rmdir()

    @staticmethod
    def _file(group: Path) -> str:
        return "cpuacct.usage" if group.parent == CPUACCT else "cpu.stat"


@contextlib.contextmanager
def cpu_of_a_tree() -> Generator[TreeCpu]:
    """Counts the CPU time of processes that are started in it."""
    # Sandboxes outlive their parent; adopted, they can be waited for.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        msg = "prctl failed; the benchmarks need Linux"
        raise SystemExit(msg)
    counter = TreeCpu()
    try:
        yield counter
    finally:
        counter.close()


def _watch_memory(process: subprocess.Popen[bytes]) -> tuple[list[tuple[float, int]], int]:
    """The worker's own size at each moment, and the largest of all its tree."""
    seen: list[tuple[float, int]] = []
    tree = 0
    with process:
        while process.poll() is None:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(process.pid)
                own = root.memory_full_info().pss
                seen.append((time.time(), own))
                # The sandboxes are not among them: their supervisors leave the tree.
                for child in root.children(recursive=True):
                    with contextlib.suppress(psutil.Error):
                        own += child.memory_full_info().pss
                tree = max(tree, own)
            time.sleep(SAMPLE_SECONDS)
    return seen, tree


def _reap_orphans() -> None:
    while True:
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime
