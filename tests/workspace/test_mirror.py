"""The commit is pinned once, and errors name what exists."""

from __future__ import annotations

import os
import tarfile
from pathlib import Path

import pytest

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.workspace.mirror import Base, pin
from sandbox_pipeline.workspace.source import Source, check_source
from tests.conftest import git, make_repo


def unpacked(base: Base, folder: Path) -> Path:
    """A home as each fork gets it."""
    home = folder / "home"
    with tarfile.open(base.archive) as tar:
        tar.extractall(home, filter="data")
    return home


async def test_the_commit_stays_pinned_when_the_branch_moves_on(repo: Path, tmp_path: Path) -> None:
    source = check_source(str(repo))
    first = await pin(source, None, tmp_path / "base", os.environ)
    (repo / "new").write_text("x", encoding="utf-8")
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "--message=second")
    moved = git(repo, "rev-parse", "HEAD").strip()
    again = await pin(source, first.branch, tmp_path / "base", os.environ, commit=first.commit)
    assert again.commit == first.commit
    first.archive.unlink()
    rebuilt = await pin(source, first.branch, tmp_path / "base", os.environ, commit=first.commit)
    assert rebuilt.commit == first.commit
    home = unpacked(rebuilt, tmp_path)
    for repository in (home / ".sandbox_pipeline" / "repo.git", home / "workspace"):
        assert git(repository, "rev-list", "--all").split() == [first.commit]
        objects = git(repository, "cat-file", "--batch-all-objects", "--batch-check")
        assert "commit" in objects
        assert moved not in objects
        assert git(repository, "remote").strip() == ""


async def test_a_missing_branch_names_those_that_exist(repo: Path, tmp_path: Path) -> None:
    git(repo, "branch", "feature/x")
    with pytest.raises(ConfigError, match=r"no branch 'nope'; it has: feature/x, main"):
        await pin(check_source(str(repo)), "nope", tmp_path / "base", os.environ)


async def test_the_repositorys_own_branch_is_the_default(repo: Path, tmp_path: Path) -> None:
    git(repo, "checkout", "--quiet", "-b", "trunk")
    base = await pin(check_source(str(repo)), None, tmp_path / "base", os.environ)
    assert base.branch == "trunk"


async def test_an_empty_repository_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    git(empty, "init", "--quiet")
    with pytest.raises(ConfigError, match="is an empty repository"):
        await pin(check_source(str(empty)), None, tmp_path / "base", os.environ)


async def test_a_folder_without_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a git repository"):
        await pin(check_source(str(tmp_path)), None, tmp_path / "base", os.environ)


async def test_a_shallow_repository_can_be_used(repo: Path, tmp_path: Path) -> None:
    (repo / "new").write_text("x", encoding="utf-8")
    git(repo, "add", "--all")
    git(repo, "commit", "--quiet", "--message=second")
    git(tmp_path, "clone", "--quiet", "--depth=1", f"file://{repo}", "cut")
    base = await pin(check_source(str(tmp_path / "cut")), None, tmp_path / "base", os.environ)
    home = unpacked(base, tmp_path)
    for repository in (home / ".sandbox_pipeline" / "repo.git", home / "workspace"):
        assert git(repository, "rev-list", "--all").split() == [base.commit]
        assert git(repository, "rev-parse", "--is-shallow-repository").strip() == "true"


async def test_hooks_and_configuration_of_the_user_take_no_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repo = make_repo(tmp_path / "r")
    trap = tmp_path / "trap"
    for hook in ("post-checkout", "reference-transaction", "pre-auto-gc"):
        path = repo / ".git" / "hooks" / hook
        path.write_text(f"#!/bin/sh\ntouch {trap}\n", encoding="utf-8")
        path.chmod(0o755)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.fsmonitor")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", f"touch {trap}")
    await pin(Source(str(repo), "file", is_remote=False), None, tmp_path / "base", os.environ)
    assert not trap.exists()
