"""The demo: a small real repository with a failing test, and three tries at mending it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

from sandbox_pipeline.config import DEMO_REPO
from sandbox_pipeline.records import Outcome, Verdict

TEMPLATE = Path(__file__).parent / "repository"
PROMPT = "Make the failing test in test_slugs.py pass without changing the tests."
EXPECTED: dict[int, tuple[Outcome, int]] = {
    0: (Outcome.SUCCESS, 0),
    1: (Outcome.FAILED, 1),
    2: (Outcome.FAILED, 128 + 6),
}
"""Outcome and exit code of each fork."""
VERDICTS = {0: Verdict.VERIFIED, 1: Verdict.REJECTED, 2: Verdict.REJECTED}
"""What the tests say of each fork's patch."""

CONFIG: dict[str, Any] = {
    "repo_url": DEMO_REPO,
    "prompt": PROMPT,
    "num_forks": len(EXPECTED),
    "verify_command": "python3 -B -m unittest --quiet",
    "verify_protect": ["test_*.py"],
    "agent": {"kind": "command", "command": "python3 agent.py {prompt_file} {fork_num}"},
}
"""What the launchpad is prefilled with."""


def make_repository(folder: Path) -> Path:
    """Make the demo's git repository unless it is there; its commit is the same everywhere."""
    repository = folder / "demo-repository"
    if (repository / ".git").exists():
        return repository
    partial = folder / f"demo-repository.{os.getpid()}"
    shutil.copytree(TEMPLATE, partial, ignore=shutil.ignore_patterns("__pycache__"))
    env = {
        "PATH": os.environ.get("PATH", os.defpath),
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_AUTHOR_DATE": "2026-01-01T00:00:00Z",
        "GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z",
    }
    for name in ("AUTHOR", "COMMITTER"):
        env[f"GIT_{name}_NAME"] = "demo"
        env[f"GIT_{name}_EMAIL"] = "demo@sandbox-pipeline.invalid"
    for arguments in (
        ["init", "--quiet", "--initial-branch=main"],
        ["add", "--all"],
        ["commit", "--quiet", "--message=A small library with a bug"],
    ):
        subprocess.run(["git", *arguments], cwd=partial, env=env, check=True)
    try:
        partial.rename(repository)
    except OSError:
        # Another process was faster; its repository is the same.
        shutil.rmtree(partial)
    return repository
