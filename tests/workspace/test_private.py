"""Private repositories by GITHUB_TOKEN, which is left nowhere."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.workspace.mirror import pin
from sandbox_pipeline.workspace.source import check_source
from tests.conftest import make_repo
from tests.servers.git_http import git_server

TOKEN = "ghp_canary7f3a9d2e51c8"


async def test_the_token_is_sent_and_left_nowhere(tmp_path: Path) -> None:
    make_repo(tmp_path / "served" / "private")
    with git_server(tmp_path / "served", TOKEN) as url:
        source = check_source(f"{url}/private/.git")
        environ = {**os.environ, "GITHUB_TOKEN": f"{TOKEN}\n"}
        base = await pin(source, None, tmp_path / "base", environ)
        assert base.branch == "main"
    for path in (tmp_path / "base").rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("token", "expected"), [("", "GITHUB_TOKEN is not set"), ("ghp_wrong", "was not accepted")]
)
async def test_a_missing_or_wrong_token_is_named(tmp_path: Path, token: str, expected: str) -> None:
    make_repo(tmp_path / "served" / "private")
    environ = {**os.environ, "GITHUB_TOKEN": token}
    with git_server(tmp_path / "served", TOKEN) as url:
        source = check_source(f"{url}/private/.git")
        with pytest.raises(ConfigError) as caught:
            await pin(source, None, tmp_path / "base", environ)
    assert expected in str(caught.value)
    assert "ghp_wrong" not in str(caught.value)


async def test_a_repository_that_does_not_exist_on_the_server_is_named(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    environ = {**os.environ, "GITHUB_TOKEN": TOKEN}
    with (
        git_server(tmp_path / "served", TOKEN) as url,
        pytest.raises(ConfigError, match="repo_url: "),
    ):
        await pin(check_source(f"{url}/nope"), None, tmp_path / "base", environ)
