"""Processes of the machine: sandboxes are counted by them, not by what the product says."""

from __future__ import annotations

import contextlib
import re
import subprocess
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import psutil

from sandbox_pipeline.sandboxes.trees import remove_tree


@contextlib.contextmanager
def started(argv: Sequence[str], **options: Any) -> Generator[subprocess.Popen[str]]:
    """A process that a test that fails doesn't leave behind."""
    with subprocess.Popen(argv, text=True, **options) as process:
        try:
            yield process
        finally:
            process.kill()


def live_sandboxes(home: Path) -> list[str]:
    """Ids of the local sandboxes of a deployment that have a supervisor process."""
    found: set[str] = set()
    for process in psutil.process_iter(["cmdline"]):
        with contextlib.suppress(psutil.Error):
            line = " ".join(process.info["cmdline"] or [])
            if "supervisor.py" in line and str(home) in line:
                match = re.search(r"local-[a-z0-9-]+", line)
                found.add(match[0] if match else line)
    return sorted(found)


def wait_until_gone(home: Path, seconds: float) -> list[str]:
    """The sandboxes that are still alive after at most so long."""
    deadline = time.monotonic() + seconds
    while (alive := live_sandboxes(home)) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def remove_once_idle(folder: Path, seconds: float = 10) -> None:
    """Remove a provider's folder, where supervisors may for a moment still be removing homes."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            remove_tree(str(folder))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return
