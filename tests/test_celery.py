"""Ops on real Celery workers: Redis as broker, store and Dagster's storage on PostgreSQL."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from sandbox_pipeline.cli.common import with_runtime
from sandbox_pipeline.records import Orchestration, Stage, orchestration_key
from sandbox_pipeline.runtime import Runtime
from tests.postgres import Postgres
from tests.processes import live_sandboxes, started, wait_until_gone
from tests.redis import running_redis
from tests.test_cli import CLI, cli

WIDTH = 2
DAGSTER_YAML = """\
telemetry:
  enabled: false
python_logs:
  python_log_level: INFO
storage:
  postgres:
    postgres_url: {url}
"""


@pytest.fixture(scope="module")
def broker() -> Iterator[str]:
    with running_redis() as url:
        yield url


@pytest.fixture
def deployment(
    home: Path, postgres: Postgres, broker: str, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """As in production: nothing of it is a file of SQLite."""
    # dagster-postgres speaks psycopg2's dialect; SQLAlchemy 2.1 takes another where none is named.
    storage = postgres.new_database().replace("+psycopg", "+psycopg2")
    (home / "dagster.yaml").write_text(DAGSTER_YAML.format(url=storage), encoding="utf-8")
    monkeypatch.setenv("SANDBOX_PIPELINE_DB_URL", postgres.new_database())
    monkeypatch.setenv("SANDBOX_PIPELINE_EXECUTOR", "celery")
    monkeypatch.setenv("SANDBOX_PIPELINE_CELERY_BROKER", broker)
    return home


@contextlib.contextmanager
def worker(name: str, folder: Path) -> Generator[subprocess.Popen[bytes]]:
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "celery", "-A", "sandbox_pipeline.defs.celery_app", "worker",
             "--concurrency", str(WIDTH), "-n", f"{name}@%h"],
            stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen[bytes]) -> None:
    """The worker with its processes, as when its machine is gone."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_of(
    repo: Path, forks: int, command: str
) -> contextlib.AbstractContextManager[subprocess.Popen[str]]:
    return started(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", str(forks),
         "--max-concurrent", str(WIDTH), "--workflow-id", "w", "--command", command,
         "--set", "rate_limit.starts=100", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL,
    )  # fmt: skip


class Peak:
    """Looks how many sandboxes are alive, until the block ends."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.most = 0

    def _watch(self) -> None:
        while not self._over.wait(0.1):
            self.most = max(self.most, len(live_sandboxes(self._home)))

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


@dataclass(frozen=True)
class State:
    owner: str
    at_work: int
    events: list[str]


def state() -> State:
    async def read(runtime: Runtime) -> State:
        found = await runtime.store.get(Orchestration, orchestration_key("w"))
        forks = await runtime.store.forks("w")
        return State(
            found.owner.run_id if found and found.owner else "",
            sum(fork.stage is Stage.AGENT for fork in forks),
            [event.name for event in await runtime.store.events("w")],
        )

    return with_runtime(read)


def wait_until(reached: Callable[[State], bool], run: subprocess.Popen[str]) -> State:
    deadline = time.monotonic() + 240
    while not reached(seen := state()):
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, seen
        time.sleep(0.2)
    return seen


@pytest.mark.timeout(600)
def test_forks_of_a_killed_worker_are_followed_to_their_end_by_another(
    deployment: Path, repo: Path, tmp_path: Path
) -> None:
    agent = "sh -c 'echo run >> runs; sleep 15'"
    with (
        worker("first", tmp_path) as first,
        Peak(deployment) as peak,
        run_of(repo, 4, agent) as run,
    ):
        wait_until(lambda seen: seen.at_work == WIDTH, run)
        with worker("second", tmp_path):
            kill(first)
            out, err = run.communicate(timeout=240)
    assert run.returncode == 0, err
    rows = json.loads(out)["forks"]
    assert [row["outcome"] for row in rows] == ["success"] * 4, rows
    assert [row["agent_attempts"] for row in rows] == [1] * 4
    assert [row["insertions"] for row in rows] == [1] * 4, "no agent was started twice"
    assert peak.most == WIDTH
    assert state().events.count("sandbox-created") == 4
    assert wait_until_gone(deployment, 10) == []


@pytest.mark.timeout(600)
def test_a_killed_run_is_taken_over_and_a_cancel_leaves_nothing(
    deployment: Path, repo: Path, tmp_path: Path
) -> None:
    agent = "sh -c 'echo run >> runs; sleep 600'"
    with worker("only", tmp_path):
        with run_of(repo, 3, agent) as first:
            killed = wait_until(lambda seen: seen.at_work == WIDTH, first)
            sandboxes = live_sandboxes(deployment)
        with run_of(repo, 3, agent) as second:
            seen = wait_until(lambda seen: seen.events.count("fork-resumed") == WIDTH, second)
            assert seen.owner != killed.owner
            assert live_sandboxes(deployment) == sandboxes, "the agents were left at work"
            assert cli("cancel", "w").returncode == 0
            out, err = second.communicate(timeout=240)
    assert second.returncode == 130, err
    assert [row["outcome"] for row in json.loads(out)["forks"]] == ["cancelled"] * 3
    assert wait_until_gone(deployment, 10) == []


def test_a_broker_that_does_not_answer_is_named_before_anything_is_created(
    deployment: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_PIPELINE_CELERY_BROKER", "redis://:secret-word@127.0.0.1:9/0")
    with run_of(repo, 1, "true") as run:
        out, err = run.communicate(timeout=240)
    assert "SANDBOX_PIPELINE_CELERY_BROKER: no answer" in out + err
    assert "secret-word" not in out + err
    assert not list(deployment.glob("sandboxes/*"))
