"""A patch as a commit on a new branch of a person's own repository, files and index untouched."""

from __future__ import annotations

import os
import subprocess
import tempfile
from pathlib import Path

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.workspace.source import check_branch

TIMEOUT_SECONDS = 300


def commit_patch(repo: Path, branch: str, base: str, patch: Path, message: str) -> str:
    """Commit a patch on top of `base` as a branch that did not exist.

    Git's plumbing works on an index of its own: neither the work tree nor the person's index
    takes part, no hook runs, and the branch appears with its commit or not at all.

    Returns:
        The commit.

    Raises:
        ConfigError: no repository, no such commit in it, the branch exists, or the patch does
            not apply.
    """
    check_branch(branch)
    if subprocess.run(
        ["git", "rev-parse", "--git-dir"], cwd=repo, capture_output=True, check=False
    ).returncode:
        msg = f"--repo: {repo.absolute()} is not in a git repository"
        raise ConfigError(msg)
    with tempfile.TemporaryDirectory() as folder:
        index = Path(folder) / "index"
        try:
            _git(repo, index, "cat-file", "-e", f"{base}^{{commit}}")
        except ConfigError:
            msg = f"--repo: commit {base} is not in {repo.absolute()}; git fetch it first"
            raise ConfigError(msg) from None
        _git(repo, index, "read-tree", base)
        _git(repo, index, "apply", "--cached", "--binary", "--whitespace=nowarn", "--",
             str(patch.absolute()))  # fmt: skip
        tree = _git(repo, index, "write-tree")
        commit = _git(repo, index, "commit-tree", tree, "-p", base, "-m", message)
        ref = f"refs/heads/{branch}"
        if _exists(repo, ref):
            msg = f"--branch: {branch!r} exists in {repo.absolute()}; choose another name"
            raise ConfigError(msg)
        _git(repo, index, "update-ref", ref, commit, "0" * len(commit))
    return commit


def _exists(repo: Path, ref: str) -> bool:
    done = subprocess.run(
        ["git", "show-ref", "--quiet", "--verify", ref], cwd=repo, capture_output=True, check=False
    )
    return done.returncode == 0


def _git(repo: Path, index: Path, *arguments: str) -> str:
    # `apply` takes paths relative to the folder it runs in: from a subfolder it would skip
    # files outside of it.
    top = subprocess.run(
        ["git", "rev-parse", "--show-toplevel"], cwd=repo, capture_output=True, check=False,
        text=True,
    ).stdout.strip()  # fmt: skip
    done = subprocess.run(
        ["git", *arguments], cwd=top or repo, env={**os.environ, "GIT_INDEX_FILE": str(index)},
        capture_output=True, check=False, text=True, errors="replace", timeout=TIMEOUT_SECONDS,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode != 0:
        msg = f"git {arguments[0]} failed: {' '.join(done.stderr.split())[-500:]}"
        raise ConfigError(msg)
    return done.stdout.strip()
