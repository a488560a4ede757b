"""What a fork is for every peer: a clone, one command in bubblewrap, and the patch.

Standard library only, since the peers have environments of their own.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PATCH = "git diff HEAD"


@dataclass(frozen=True)
class Job:
    """What a peer is asked for, as JSON its only argument.

    Attributes:
        repo: the repository to clone.
        forks: how many.
        width: how many at once.
        command: of each fork, for a shell in its clone.
        isolation: bubblewrap with all options but the fork's own folders.
        answer: where the patches go.
        executor: Dagster's.
    """

    repo: str
    forks: int
    width: int
    command: str
    isolation: list[str]
    answer: str
    executor: str = ""

    @classmethod
    def asked(cls) -> Job:
        """The one of the command line."""
        return cls(**json.loads(sys.argv[1]))

    def done(self, patches: list[str]) -> None:
        """Write the patches, one of each fork that did all its work."""
        Path(self.answer).write_text(json.dumps(patches), encoding="utf-8")


def clone(repo: str) -> Path:
    """A clone of the repository in a folder of its own."""
    folder = Path(tempfile.mkdtemp(prefix="peer-"), "repo")
    subprocess.run(["git", "clone", "--quiet", repo, str(folder)], check=True)
    return folder


def remove(folder: Path) -> None:
    """Remove a clone."""
    shutil.rmtree(folder.parent)


@contextlib.contextmanager
def cloned(repo: str) -> Iterator[Path]:
    """A clone that is removed in the end."""
    folder = clone(repo)
    try:
        yield folder
    finally:
        remove(folder)


def inside(isolation: list[str], folder: Path | str) -> list[str]:
    """The command line that a program's own follows to run it isolated, in this folder."""
    return [*isolation, "--bind", str(folder), str(folder), "--chdir", str(folder)]
