"""One clone of the repository for all forks, on the host; the base commit is pinned here.

Git runs without the user's configuration, hooks or prompts, and with one transport only.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import stat
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from sandbox_pipeline.errors import ConfigError, PipelineError
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.sandboxes.base import STATE_DIR, WORKSPACE
from sandbox_pipeline.workspace.source import Source, check_branch

ARCHIVE = "base.tar"
CLONE_TIMEOUT_SECONDS = 1800
LS_REMOTE_TIMEOUT_SECONDS = 120
MAX_LISTED_BRANCHES = 20

# The token reaches git by the environment of this one process tree: not by its arguments,
# which every user of the machine can read, and not by a file.
_ASKPASS = """\
#!/bin/sh
case "$1" in
Username*) echo x-access-token ;;
*) printf '%s\\n' "$SANDBOX_PIPELINE_GIT_TOKEN" ;;
esac
"""


@dataclass(frozen=True)
class Base:
    """What every fork starts from.

    Attributes:
        archive: tar file of a home with the commit and its history: a bare repository
            `.sandbox_pipeline/repo.git`, and `workspace/.git`, of which nothing is checked out.
    """

    commit: str
    branch: str
    archive: Path


class GitError(PipelineError):
    """Git failed for another reason than what the person asked for, such as the network."""


async def pin(
    source: Source,
    branch: str | None,
    folder: Path,
    environ: Mapping[str, str],
    *,
    commit: str | None = None,
) -> Base:
    """Clone the branch into `folder` and pack it for the forks, unless that was done before.

    Args:
        source: where from.
        branch: None for the repository's own.
        folder: made if missing; belongs to one orchestration.
        environ: for PATH and GITHUB_TOKEN.
        commit: what an earlier run pinned; kept, even if the branch moved on.

    Raises:
        ConfigError: no such repository or branch, or nothing in it.
        GitError: git failed otherwise.
    """
    git = Git(source, folder, environ)
    archive = folder / ARCHIVE
    mirror = folder / "mirror.git"
    if commit is None or not archive.exists():
        if branch is not None:
            check_branch(branch)
        branch = await _choose_branch(git, source, branch)
        shutil.rmtree(mirror, ignore_errors=True)
        await git.run(
            ["clone", "--quiet", "--bare", "--no-tags", "--single-branch", "--branch", branch,
             "--", source.url, str(mirror)],
            timeout_seconds=CLONE_TIMEOUT_SECONDS,
        )  # fmt: skip
        tip = f"refs/heads/{branch}"
        if commit is not None:
            await git.run(["-C", str(mirror), "update-ref", tip, commit])
        found = await git.run(["-C", str(mirror), "rev-parse", "--verify", f"{tip}^{{commit}}"])
        commit = found.strip()
        await _pack(git, mirror, branch, archive)
    assert branch is not None  # noqa: S101 - a pinned commit comes with its branch
    return Base(commit, branch, archive)


async def _pack(git: Git, mirror: Path, branch: str, archive: Path) -> None:
    """Make the archive, once for all forks: each would need a dozen processes of git for it.

    It is fetched and not copied, so that nothing is in it but the branch up to its commit.
    """
    home = archive.with_name("home")
    shutil.rmtree(home, ignore_errors=True)
    bare = home / Path(STATE_DIR).name / "repo.git"
    bare.parent.mkdir(parents=True)
    workspace = home / Path(WORKSPACE).name
    ref = f"refs/heads/{branch}"
    local = ["-c", "protocol.file.allow=always"]
    await git.run(
        ["init", "--quiet", "--bare", "--template=", f"--initial-branch={branch}", str(bare)]
    )
    await git.run(
        [*local, "-c", "fetch.unpackLimit=1", "-c", "gc.auto=0", "-c", "maintenance.auto=false",
         "-C", str(bare), "fetch", "--quiet", "--no-tags", "--no-write-fetch-head",
         "--update-shallow", str(mirror), f"{ref}:{ref}"],
        timeout_seconds=CLONE_TIMEOUT_SECONDS,
    )  # fmt: skip
    await git.run(
        [*local, "clone", "--quiet", "--no-checkout", "--template=", "--", str(bare),
         str(workspace)],
        timeout_seconds=CLONE_TIMEOUT_SECONDS,
    )  # fmt: skip
    await git.run(["-C", str(workspace), "remote", "remove", "origin"])
    for repository in (bare, workspace):
        await git.run(["-C", str(repository), "pack-refs", "--all"])
    await asyncio.to_thread(_write_archive, home, archive)


def _write_archive(home: Path, archive: Path) -> None:
    """Only what git can't do without: each fork makes a file of its own of all that is in it."""
    shutil.rmtree(home / Path(WORKSPACE).name / ".git" / "logs", ignore_errors=True)
    for folder, _, _ in os.walk(home, topdown=False):
        if Path(folder).name not in ("refs", "objects"):
            with contextlib.suppress(OSError):
                Path(folder).rmdir()
    partial = archive.with_suffix(".partial")
    with tarfile.open(partial, "w") as tar:
        for part in sorted(home.iterdir()):
            tar.add(part, part.name)
    partial.replace(archive)
    shutil.rmtree(home, ignore_errors=True)


async def read_branches(
    source: Source, branch: str | None, folder: Path, environ: Mapping[str, str]
) -> str:
    """The branch that would be used; clones nothing.

    Raises:
        ConfigError: no such repository or branch, or nothing in it.
        GitError: git failed otherwise.
    """
    return await _choose_branch(Git(source, folder, environ), source, branch)


async def _choose_branch(git: Git, source: Source, branch: str | None) -> str:
    listing = await git.run(
        ["ls-remote", "--symref", "--", source.url, "HEAD", "refs/heads/*"],
        timeout_seconds=LS_REMOTE_TIMEOUT_SECONDS,
    )
    head: str | None = None
    branches: list[str] = []
    for line in listing.splitlines():
        left, _, name = line.partition("\t")
        if left.startswith("ref: refs/heads/") and name == "HEAD":
            head = left.removeprefix("ref: refs/heads/")
        elif name.startswith("refs/heads/"):
            branches.append(name.removeprefix("refs/heads/"))
    if not branches:
        msg = f"repo_url: {source.url} is an empty repository; commit something first"
        raise ConfigError(msg)
    wanted = branch or (head if head in branches else branches[0])
    if wanted not in branches:
        shown = ", ".join(sorted(branches)[:MAX_LISTED_BRANCHES])
        more = len(branches) - MAX_LISTED_BRANCHES
        msg = f"branch: {source.url} has no branch {wanted!r}; it has: {shown}"
        raise ConfigError(msg + (f" and {more} more" if more > 0 else ""))
    return wanted


class Git:
    """Git on the host: no configuration of a person, no hooks, no prompts, one transport.

    Args:
        source: whose transport is allowed, and who gets the token.
        folder: for askpass; made if missing.
        environ: for PATH, proxies and GITHUB_TOKEN.
    """

    def __init__(self, source: Source, folder: Path, environ: Mapping[str, str]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._source = source
        token = environ.get("GITHUB_TOKEN", "").strip() if source.is_remote else ""
        self._redactor = Redactor([token])
        self._has_token = bool(token)
        self._env = {
            "PATH": environ.get("PATH", os.defpath),
            "HOME": str(folder),
            "LC_ALL": "C",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "GIT_TERMINAL_PROMPT": "0",
        }
        for name in ("HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy", "GIT_SSL_CAINFO",
                     "SSL_CERT_FILE"):  # fmt: skip
            if name in environ:
                self._env[name] = environ[name]
        if token:
            askpass = folder / "askpass"
            askpass.write_text(_ASKPASS, encoding="ascii")
            askpass.chmod(stat.S_IRWXU)
            self._env |= {"GIT_ASKPASS": str(askpass), "SANDBOX_PIPELINE_GIT_TOKEN": token}

    async def run(self, arguments: list[str], *, timeout_seconds: float = 600) -> str:
        """What git printed.

        Raises:
            ConfigError: no such repository, or no right to it.
            GitError: git failed otherwise.
        """
        settings = (
            "protocol.allow=never",
            f"protocol.{self._source.protocol}.allow=always",
            "safe.directory=*",
            "core.hooksPath=/dev/null",
        )
        options = [part for setting in settings for part in ("-c", setting)]
        process = await asyncio.create_subprocess_exec(
            "git", *options, *arguments,
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE, env=self._env, start_new_session=True,
        )  # fmt: skip
        try:
            out, err = await asyncio.wait_for(process.communicate(), timeout_seconds)
        except TimeoutError:
            msg = f"git {arguments[0]} of {self._source.url} took longer than {timeout_seconds:g} s"
            raise GitError(msg) from None
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        if process.returncode != 0:
            raise self._explain(arguments, err.decode("utf-8", "replace"))
        return out.decode("utf-8", "replace")

    def _explain(self, arguments: list[str], stderr: str) -> PipelineError:
        text = self._redactor.text(" ".join(stderr.split()))[-500:]
        url = self._source.url
        lowered = text.lower()
        if "could not read username" in lowered or "authentication failed" in lowered:
            how = "was not accepted" if self._has_token else "is not set"
            return ConfigError(
                f"repo_url: {url} does not exist or needs a login, and GITHUB_TOKEN {how}"
            )
        if "not found" in lowered or "does not appear to be a git repository" in lowered:
            return ConfigError(f"repo_url: {url} is not a git repository ({text})")
        return GitError(f"git {arguments[0]} of {url} failed: {text}")
