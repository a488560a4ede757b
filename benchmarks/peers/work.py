"""What a fork is for every peer: a clone, one command in bubblewrap, and the patch.

Standard library only, since each peer has an environment of its own.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

BWRAP = [
    "bwrap", "--ro-bind", "/", "/", "--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp",
    "--unshare-all", "--die-with-parent",
]  # fmt: skip


def in_bubblewrap(folder: Path | str, command: str) -> list[str]:
    """The command line that runs a shell command in an isolated process with this folder."""
    return [*BWRAP, "--bind", str(folder), str(folder), "--chdir", str(folder), "sh", "-c", command]


def clone(repo: str) -> tempfile.TemporaryDirectory[str]:
    """A clone of the repository in a folder of its own."""
    folder = tempfile.TemporaryDirectory(prefix="peer-")
    subprocess.run(["git", "clone", "--quiet", repo, f"{folder.name}/repo"], check=True)
    return folder
