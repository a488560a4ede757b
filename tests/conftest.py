"""What all tests share: real git repositories and a deployment in a folder of its own."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.config import OrchestrationConfig, SandboxConfig, parse_config
from sandbox_pipeline.instance import ensure_home
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import Sandbox, SandboxSpec
from sandbox_pipeline.sandboxes.local import LocalProvider
from sandbox_pipeline.settings import Settings
from sandbox_pipeline.store import Store
from sandbox_pipeline.testing import FakeAgent, FaultyProvider
from tests.postgres import Postgres, running_postgres
from tests.processes import live_sandboxes

GIT_ENV = {
    "PATH": os.environ["PATH"],
    "GIT_CONFIG_NOSYSTEM": "1",
    "GIT_CONFIG_GLOBAL": os.devnull,
    "GIT_AUTHOR_NAME": "a",
    "GIT_AUTHOR_EMAIL": "a@example.invalid",
    "GIT_COMMITTER_NAME": "a",
    "GIT_COMMITTER_EMAIL": "a@example.invalid",
}


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, env=GIT_ENV, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


def make_repo(folder: Path, files: dict[str, str | bytes] | None = None) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init", "--quiet", "--initial-branch=main")
    for name, content in (files or {"README.md": "hello\n"}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message=first")
    return folder


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    return make_repo(tmp_path / "repo")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A deployment of its own; at the end none of its sandboxes may be alive."""
    for name in [name for name in os.environ if name.startswith("SANDBOX_PIPELINE_")]:
        if not name.startswith("SANDBOX_PIPELINE_TEST_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    monkeypatch.setenv("DAGSTER_HOME", str(folder))
    monkeypatch.setenv("SANDBOX_PIPELINE_ORCHESTRATIONS", str(tmp_path / "orchestrations"))
    ensure_home(folder)
    yield folder
    assert live_sandboxes(folder) == [], "sandboxes outlived the test"


@pytest.fixture
async def provider(home: Path) -> FaultyProvider:
    return FaultyProvider(LocalProvider(home / "sandboxes"))


@pytest.fixture
async def local_sandbox(tmp_path: Path) -> AsyncIterator[Sandbox]:
    """An empty local sandbox."""
    local = LocalProvider(tmp_path / "sandboxes")
    spec = SandboxSpec("one", {"app": "test"}, 120, "none", SandboxConfig())
    made = await local.create(spec)
    yield made
    await local.kill(made.sandbox_id)


@pytest.fixture
def agent() -> FakeAgent:
    return FakeAgent()


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL server, started when first asked for."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def db_url() -> str | None:
    """Another store than the deployment's own SQLite; for modules that run on both."""
    return None


@pytest.fixture
async def runtime(
    home: Path, provider: FaultyProvider, agent: FakeAgent, db_url: str | None
) -> AsyncIterator[Runtime]:
    environ = dict(os.environ)
    settings = Settings.from_environ(environ, home=home)
    made = Runtime(
        Store.open(db_url or settings.db_url),
        settings,
        environ,
        providers={"local": provider},
        agents={"fake": agent},
    )
    yield made
    await made.close()


@pytest.fixture
def config(repo: Path) -> Callable[..., OrchestrationConfig]:
    """A small valid configuration, with changes."""

    def make(**changes: Any) -> OrchestrationConfig:
        data: dict[str, Any] = {
            "repo_url": str(repo),
            "prompt": "do it",
            "num_forks": 2,
            "agent": {"kind": "fake"},
            "sandbox": {"provider": "local"},
            "retry": {"initial_seconds": 0.01, "max_seconds": 0.05},
            "rate_limit": {"starts": 1000, "window_ms": 1},
        }
        for name, value in changes.items():
            if isinstance(value, dict) and isinstance(data.get(name), dict):
                data[name] = {**data[name], **value}
            else:
                data[name] = value
        return parse_config(data)

    return make
