"""Finds and kills all that descends from a process, where no namespace does it (`isolation: none`).

Standard library only, since supervisor and shim use it. On Linux orphans come back to whoever is
their subreaper, so that nothing escapes; elsewhere a process whose parents ended is not found.
"""

# ruff: noqa: PTH123, PTH208 (pathlib is slow to import)
from __future__ import annotations

import contextlib
import os
import signal
import sys
import time


def become_subreaper() -> None:
    """Make orphaned descendants children of this process (Linux only; elsewhere nothing)."""
    if not sys.platform.startswith("linux"):
        return
    import ctypes

    pr_set_child_subreaper = 36
    ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def kill_descendants(limit_seconds: float = 5.0) -> None:
    """Kill and reap what descends from this process, again until nothing is left."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        for pid in _descendants():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def _descendants() -> list[int]:
    parents = _parents() if sys.platform.startswith("linux") else _parents_by_ps()
    found = [os.getpid()]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found[1:]


def _parents() -> dict[int, int]:
    found: dict[int, int] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError, IndexError, ValueError):
                found[int(name)] = _parent(name)
    return found


def _parent(pid: str) -> int:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        # The name before the last parenthesis may hold anything.
        return int(file.read().rpartition(")")[2].split()[1])


def _parents_by_ps() -> dict[int, int]:
    import subprocess

    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=False
    )
    rows = [line.split() for line in listing.stdout.splitlines()]
    return {int(row[0]): int(row[1]) for row in rows if len(row) == 2}
