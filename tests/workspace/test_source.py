"""Repositories and branches that would be dangerous are refused, with the reason."""

from __future__ import annotations

from pathlib import Path

import pytest

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.workspace.source import check_branch, check_source


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("--upload-pack=touch /tmp/x", "looks like an option"),
        ("ext::sh -c touch% /tmp/x", "remote helper 'ext::'"),
        ("fd::17", "remote helper"),
        ("file:///etc", "file:// is off"),
        ("ssh://host/x", "'ssh://' is not supported"),
        ("git@github.com:a/b", "ssh is not supported"),
        ("git://host/x", "'git://' is not supported"),
        ("http://example.com/x", "'http://' is not supported"),
        ("https://", "is not supported"),
        ("https://x:hunter2hunter2@github.com/a/b", "set GITHUB_TOKEN"),
        ("https://ghp_canarycanary@github.com/a/b", "set GITHUB_TOKEN"),
        ("/no/such/folder", "no such folder"),
        ("a\nb", "control characters"),
    ],
)
def test_refused(url: str, expected: str) -> None:
    with pytest.raises(ConfigError, match=r"^repo_url: ") as caught:
        check_source(url)
    assert expected in str(caught.value)
    assert "hunter2" not in str(caught.value)
    assert "canary" not in str(caught.value)


def test_accepted(tmp_path: Path) -> None:
    assert check_source("https://github.com/a/b").protocol == "https"
    assert check_source("http://127.0.0.1:1/x").is_remote
    assert check_source(str(tmp_path)).url == str(tmp_path.resolve())
    assert check_source("file:///x", allow_file_urls=True).protocol == "file"


@pytest.mark.parametrize("name", ["-x", "--upload-pack", "a..b", "a b", "a\nb", "", "x.lock", "@{"])
def test_bad_branch_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="is not a valid branch name"):
        check_branch(name)
