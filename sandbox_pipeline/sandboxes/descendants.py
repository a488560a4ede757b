"""Finds and kills processes where no namespace does it: without isolation, and at the start of one.

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
        for pid in family(os.getpid())[1:]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(0.002)


def kill_below(root: int, limit_seconds: float = 1.0) -> None:
    """Stop a process, so that it starts nothing more, and kill what descends from it."""
    end = time.monotonic() + limit_seconds
    with contextlib.suppress(OSError):
        os.kill(root, signal.SIGSTOP)
    while time.monotonic() < end:
        with contextlib.suppress(OSError, IndexError):
            if _stat_fields(str(root))[0] not in "TtZX":
                time.sleep(0.001)
                continue
        break
    for pid in family(root)[1:]:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def kill_named(name: str, limit_seconds: float = 2.0) -> None:
    """Kill what has this name among its arguments or as `SANDBOX_NAME` in its environment."""
    end = time.monotonic() + limit_seconds
    while time.monotonic() < end:
        found = [pid for pid in _pids() if _is_named(pid, name.encode())]
        if not found:
            return
        for pid in found:
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)
        time.sleep(0.01)


def _is_named(pid: str, name: bytes) -> bool:
    if int(pid) == os.getpid():
        return False
    for file, entry in (("cmdline", name), ("environ", b"SANDBOX_NAME=" + name)):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/{file}", "rb") as stream:
            if entry in stream.read().split(b"\0"):
                return True
    return False


def family(root: int) -> list[int]:
    """A process and all that descend from it, parents first."""
    parents = _parents() if sys.platform.startswith("linux") else _parents_by_ps()
    found = [root]
    for pid in found:
        found.extend(child for child, parent in parents.items() if parent == pid)
    return found


def _parents() -> dict[int, int]:
    found: dict[int, int] = {}
    for pid in _pids():
        with contextlib.suppress(OSError, IndexError, ValueError):
            found[int(pid)] = int(_stat_fields(pid)[1])
    return found


def _pids() -> list[str]:
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _stat_fields(pid: str) -> list[str]:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        # The name before the last parenthesis may hold anything.
        return file.read().rpartition(")")[2].split()


def _parents_by_ps() -> dict[int, int]:
    import subprocess

    listing = subprocess.run(
        ["/bin/ps", "-A", "-o", "pid=,ppid="], stdout=subprocess.PIPE, text=True, check=False
    )
    rows = [line.split() for line in listing.stdout.splitlines()]
    return {int(row[0]): int(row[1]) for row in rows if len(row) == 2}
