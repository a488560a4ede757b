"""Branches and pull requests, on a real git server and a server that speaks GitHub's API."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import AgentError, ConfigError
from sandbox_pipeline.publishing import _body, publish
from sandbox_pipeline.records import Fork, Orchestration, fork_key, orchestration_key
from sandbox_pipeline.results import ranking_of
from sandbox_pipeline.runtime import Runtime, silent
from sandbox_pipeline.testing import FaultyProvider, drive
from tests.conftest import git, make_repo
from tests.processes import started
from tests.servers.git_http import git_server
from tests.servers.github_api import GitHub, github_api
from tests.test_cli import CLI, cli

Make = Callable[..., OrchestrationConfig]
TOKEN = "ghp_canary51c87f3a9d2e"


@pytest.fixture
def served(tmp_path: Path) -> Path:
    """The bare repository that is pushed to."""
    work = make_repo(tmp_path / "work", {"README.md": "hello\n"})
    bare = tmp_path / "served" / "o" / "r.git"
    bare.parent.mkdir(parents=True)
    git(tmp_path, "clone", "--quiet", "--bare", str(work), str(bare))
    git(bare, "config", "http.receivepack", "true")
    return bare


@pytest.fixture
def github() -> Iterator[GitHub]:
    with github_api(TOKEN) as server:
        yield server


@pytest.fixture
def url(served: Path, github: GitHub, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("GITHUB_TOKEN", TOKEN)
    monkeypatch.setenv("SANDBOX_PIPELINE_GITHUB_API", github.url)
    with git_server(served.parents[1], TOKEN) as base:
        yield f"{base}/o/r.git"


@pytest.fixture
def home(home: Path, url: str, github: GitHub, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The runtime's environment is read after the servers are known."""
    monkeypatch.setenv("SANDBOX_PIPELINE_GITHUB_API", github.url)
    return home


def asked(config: Make, url: str, **changes: Any) -> OrchestrationConfig:
    wanted = {"to": "pull_request", "trailer": "Signed-off-by: A <a@b.c>", **changes}
    return config(repo_url=url, publish=wanted, prompt="Add a file\n\nplease")


async def published(runtime: Runtime, workflow: str = "w") -> list[Fork]:
    orchestration = await runtime.store.need(Orchestration, orchestration_key(workflow))
    forks = await runtime.store.forks(workflow)
    ranked = ranking_of(orchestration, forks)
    return await publish(runtime, orchestration, forks, ranked, run_id="run-1", announce=silent)


def branches(served: Path) -> list[str]:
    listed = git(served, "for-each-ref", "--format=%(refname:short)", "refs/heads")
    return [name for name in listed.splitlines() if name != "main"]


async def test_twice_is_one_branch_and_one_pull_request(
    runtime: Runtime, config: Make, url: str, served: Path, github: GitHub, home: Path,
    provider: FaultyProvider,
) -> None:  # fmt: skip
    await drive(runtime, asked(config, url), "w")
    [fork] = await published(runtime)
    assert fork.published is not None
    branch = f"forks/w/{fork.fork_num}"
    assert branches(served) == [branch]
    assert git(served, "log", "--format=%an %ae", "-1", branch) == (
        "sandbox-pipeline noreply@sandbox-pipeline.invalid"
    )
    message = git(served, "log", "--format=%B", "-1", branch)
    assert message.startswith("Add a file\n")
    assert message.rstrip().endswith("Signed-off-by: A <a@b.c>")
    assert git(served, "rev-parse", f"{branch}^") == git(served, "rev-parse", "main")
    assert git(served, "show", f"{branch}:fork_{fork.fork_num}.txt") == f"fork {fork.fork_num}"
    [pull] = github.pulls
    assert (pull["head"]["ref"], pull["base"]["ref"]) == (branch, "main")
    assert f"fork {fork.fork_num} wins" in pull["body"]
    assert fork.published.url == pull["html_url"]

    # Again; and again as if the store had not got to know: a kill right after the push.
    await published(runtime)
    key = fork_key("w", fork.fork_num)
    await runtime.store.update(Fork, key, lambda it: it.evolve(published=None))
    [again] = await published(runtime)
    assert again.published == fork.published, "the same commit at every try"
    assert branches(served) == [branch]
    assert len(github.pulls) == 1
    assert provider.ledger.alive == []
    for path in home.rglob("*"):
        if path.is_file():
            assert TOKEN.encode() not in path.read_bytes(), path


async def test_all_forks_as_branches_only(
    runtime: Runtime, config: Make, url: str, served: Path, github: GitHub
) -> None:
    settings = asked(config, url, to="branch", forks="all").model_copy(update={"max_concurrent": 1})
    await drive(runtime, settings, "w")
    assert len(await published(runtime)) == 2
    assert branches(served) == ["forks/w/0", "forks/w/1"]
    assert github.pulls == []


async def test_a_lost_answer_does_not_open_a_second_one(
    runtime: Runtime, config: Make, url: str, github: GitHub
) -> None:
    github.lose_answers = 1
    await drive(runtime, asked(config, url), "w")
    with pytest.raises(Exception, match="GitHub's API failed"):
        await published(runtime)
    [fork] = await published(runtime)
    assert fork.published is not None
    assert len(github.pulls) == 1


async def test_a_branch_with_something_else_is_left_alone(
    runtime: Runtime, config: Make, url: str, served: Path, github: GitHub
) -> None:
    main = git(served, "rev-parse", "main")
    for number in range(2):
        git(served, "update-ref", f"refs/heads/forks/w/{number}", main)
    await drive(runtime, asked(config, url), "w")
    with pytest.raises(ConfigError, match="exists with another commit"):
        await published(runtime)
    assert git(served, "rev-parse", "forks/w/0") == main
    assert github.pulls == []


async def test_a_remote_that_rejects_is_named_and_can_be_tried_again(
    runtime: Runtime, config: Make, url: str, served: Path, provider: FaultyProvider
) -> None:
    hook = served / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\necho protected by policy >&2\nexit 1\n", encoding="utf-8")
    hook.chmod(0o755)
    await drive(runtime, asked(config, url), "w")
    with pytest.raises(Exception, match="pre-receive hook declined"):
        await published(runtime)
    assert branches(served) == []
    hook.unlink()
    assert len(await published(runtime)) == 1
    assert provider.ledger.alive == []


@pytest.mark.parametrize("status", [401, 403, 404])
async def test_a_token_without_rights_is_said(
    runtime: Runtime, config: Make, url: str, github: GitHub, status: int
) -> None:
    await drive(runtime, asked(config, url), "w")
    github.status = status
    with pytest.raises(ConfigError, match=f"no right to pull requests.*{status}") as error:
        await published(runtime)
    assert TOKEN not in str(error.value)


async def test_a_patch_that_does_not_apply_is_not_published(
    runtime: Runtime, config: Make, url: str, served: Path, provider: FaultyProvider
) -> None:
    done = await drive(runtime, asked(config, url, forks="all"), "w")
    Path(str(done.rows[0]["patch_path"])).write_text("nonsense", encoding="utf-8")
    with pytest.raises(AgentError, match="no commit could be made of the patch"):
        await published(runtime)
    assert branches(served) == []
    assert provider.ledger.alive == []


async def test_what_an_agent_says_neither_mentions_nor_links(
    runtime: Runtime, config: Make, url: str
) -> None:
    await drive(runtime, asked(config, url), "w")
    orchestration = await runtime.store.need(Orchestration, orchestration_key("w"))
    forks = await runtime.store.forks("w")
    evil = [it.evolve(message="@everyone fixes #1 `x` | [a](http://b)", patch=None) for it in forks]
    body = _body(orchestration, evil[0], ranking_of(orchestration, evil))
    row = next(line for line in body.splitlines() if line.startswith("| 1 |"))
    assert row.count("|") == 5
    assert row.count("`") == 2


@pytest.mark.parametrize(
    ("settings", "environ", "message"),
    [
        (["publish.to=branch"], {"GITHUB_TOKEN": ""}, "publish.to: needs GITHUB_TOKEN"),
        (
            ["publish.to=pull_request"],
            {"SANDBOX_PIPELINE_GITHUB_API": ""},
            "needs a repository on GitHub",
        ),
        (["publish.author_name='a <b>'"], {}, "publish.author_name"),
        (["publish.trailer=nonsense"], {}, "publish.trailer"),
        (["publish.to=everywhere"], {}, "publish.to"),
    ],
)
def test_what_cannot_be_published_is_said_before_anything_is_created(
    home: Path, url: str, settings: list[str], environ: dict[str, str], message: str
) -> None:
    options = [part for setting in settings for part in ("--set", setting)]
    done = cli("run", "--repo", url, "--prompt", "p", "--command", "true", *options, **environ)
    assert (done.returncode, message in done.stderr) == (2, True), done.stderr
    assert not list(home.glob("sandboxes/*"))


def test_killed_in_the_middle_then_again_gives_one_branch_and_one_pull_request(
    home: Path, url: str, served: Path, github: GitHub
) -> None:
    arguments = ["run", "--repo", url, "--prompt", "p", "--forks", "1", "--workflow-id", "again",
                 "--command", "sh -c 'echo 1 > made'", "--set", "publish.to=pull_request",
                 "--json"]  # fmt: skip
    with started([*CLI, *arguments], stdout=subprocess.DEVNULL):
        deadline = time.monotonic() + 60
        while not branches(served) and time.monotonic() < deadline:
            time.sleep(0.005)
    assert branches(served) == ["forks/again/0"]
    done = cli(*arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout)["run_status"] == "SUCCESS"
    assert branches(served) == ["forks/again/0"]
    assert len(github.pulls) == 1
    assert os.environ["GITHUB_TOKEN"] == TOKEN
    assert TOKEN not in done.stdout
