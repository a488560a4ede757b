"""Which repositories may be cloned, and how a branch may be named."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from sandbox_pipeline.errors import ConfigError

LOOPBACK = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True)
class Source:
    """A repository that may be cloned.

    Attributes:
        url: what git is given; never holds a credential.
        protocol: the only transport git may use for it.
        is_remote: a token may be sent to it.
    """

    url: str
    protocol: str
    is_remote: bool


def check_source(repo_url: str, *, allow_file_urls: bool = False) -> Source:
    """Decide how a repository is reached.

    Raises:
        ConfigError: it is not https, a local path, or file:// where allowed; a credential in
            the URL is refused and not echoed.
    """
    if repo_url.startswith("-"):
        msg = f"repo_url: {repo_url!r} looks like an option; give a URL or a path"
        raise ConfigError(msg)
    if any(ord(char) < 32 for char in repo_url):
        msg = "repo_url: must not contain control characters"
        raise ConfigError(msg)
    if re.match(r"[A-Za-z0-9+.-]+::", repo_url):
        helper = repo_url.split("::", 1)[0]
        msg = f"repo_url: the remote helper '{helper}::' could run commands; use https:// or a path"
        raise ConfigError(msg)
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", repo_url)
    if scheme is None:
        return _local(repo_url)
    return _by_url(repo_url, scheme[1].lower(), allow_file_urls=allow_file_urls)


def check_branch(branch: str) -> str:
    """The name of a branch, checked by git's own rules.

    Raises:
        ConfigError: git would not take it, or take it for an option.
    """
    bad = branch.startswith("-") or any(ord(char) < 32 for char in branch)
    if not bad:
        found = subprocess.run(
            ["git", "check-ref-format", f"refs/heads/{branch}"], check=False, capture_output=True
        )
        bad = found.returncode != 0
    if bad:
        msg = f"branch: {branch!r} is not a valid branch name"
        raise ConfigError(msg)
    return branch


def _by_url(repo_url: str, scheme: str, *, allow_file_urls: bool) -> Source:
    try:
        parts = urlsplit(repo_url)
        host, user = parts.hostname, parts.username or parts.password
    except ValueError:
        msg = "repo_url: not a valid URL"
        raise ConfigError(msg) from None
    if user is not None:
        msg = (
            f"repo_url: has a credential before '@{host}'; remove it and set GITHUB_TOKEN in the "
            "environment instead"
        )
        raise ConfigError(msg)
    if scheme == "file":
        if not allow_file_urls:
            msg = (
                f"repo_url: {repo_url!r}: file:// is off; give the plain path, or set "
                "allow_file_urls: true"
            )
            raise ConfigError(msg)
        return Source(repo_url, "file", is_remote=False)
    if scheme == "https" and host:
        return Source(repo_url, "https", is_remote=True)
    if scheme == "http" and host in LOOPBACK:
        return Source(repo_url, "http", is_remote=True)
    msg = f"repo_url: {repo_url!r}: '{scheme}://' is not supported; use https:// or a local path"
    raise ConfigError(msg)


def _local(repo_url: str) -> Source:
    path = Path(os.path.expanduser(repo_url))  # noqa: PTH111 - Path.expanduser raises for ~nobody
    if re.match(r"[^/\s]+@[^/\s]+:", repo_url):
        host = repo_url.split(":", maxsplit=1)[0]
        msg = f"repo_url: {host!r}: ssh is not supported; use https:// or a path"
        raise ConfigError(msg)
    if not path.exists():
        msg = f"repo_url: no such folder: {path}"
        raise ConfigError(msg)
    return Source(str(path.resolve()), "file", is_remote=False)
