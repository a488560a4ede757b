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
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.postgres import Postgres
from tests.processes import live_sandboxes, wait_until_gone
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
    storage = postgres.new_database().replace("+psycopg", "")
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


def start(repo: Path, forks: int, command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", str(forks),
         "--max-concurrent", str(WIDTH), "--workflow-id", "w", "--command", command,
         "--set", "rate_limit.starts=100", "--json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, stdin=subprocess.DEVNULL,
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


def status() -> dict[str, Any]:
    done = cli("status", "w", "--json")
    return json.loads(done.stdout) if done.stdout else {"forks": [], "state": "unknown"}


def wait_for_agents(count: int, run: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while sum(fork["stage"] == "agent" for fork in status()["forks"]) < count:
        assert run.poll() is None, run.communicate()
        assert time.monotonic() < deadline, status()
        time.sleep(0.2)


def test_forks_of_a_killed_worker_are_followed_to_their_end_by_another(
    deployment: Path, repo: Path, tmp_path: Path
) -> None:
    with worker("first", tmp_path) as first, Peak(deployment) as peak:
        run = start(repo, 5, "sh -c 'echo run >> runs; sleep 8'")
        wait_for_agents(WIDTH, run)
        with worker("second", tmp_path):
            kill(first)
            out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err
    rows = json.loads(out)["forks"]
    assert [row["outcome"] for row in rows] == ["success"] * 5, rows
    assert [row["agent_attempts"] for row in rows] == [1] * 5
    assert [row["insertions"] for row in rows] == [1] * 5, "no agent was started twice"
    assert peak.most == WIDTH
    events = [json.loads(line)["name"] for line in cli("events", "w", "--json").stdout.splitlines()]
    assert events.count("sandbox-created") == 5
    assert wait_until_gone(deployment, 10) == []


def test_a_killed_run_is_taken_over_and_a_cancel_leaves_nothing(
    deployment: Path, repo: Path, tmp_path: Path
) -> None:
    agent = "sh -c 'echo run >> runs; sleep 60'"
    with worker("only", tmp_path):
        first = start(repo, 4, agent)
        wait_for_agents(WIDTH, first)
        sandboxes = live_sandboxes(deployment)
        first.kill()
        first.communicate()
        second = start(repo, 4, agent)
        deadline = time.monotonic() + 60
        while status()["run_id"] == status_run(first) and time.monotonic() < deadline:
            time.sleep(0.2)
        wait_for_agents(WIDTH, second)
        assert live_sandboxes(deployment) == sandboxes, "the agents were left at work"
        assert cli("cancel", "w").returncode == 0
        out, err = second.communicate(timeout=60)
    assert second.returncode == 130, err
    rows = json.loads(out)["forks"]
    assert [row["outcome"] for row in rows] == ["cancelled"] * 4
    assert wait_until_gone(deployment, 10) == []


def status_run(run: subprocess.Popen[str]) -> str:
    return ""


def test_a_broker_that_does_not_answer_is_named_before_anything_is_created(
    deployment: Path, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SANDBOX_PIPELINE_CELERY_BROKER", "redis://:secret-word@127.0.0.1:9/0")
    out, err = start(repo, 1, "true").communicate(timeout=60)
    assert "SANDBOX_PIPELINE_CELERY_BROKER: no answer" in out + err
    assert "secret-word" not in out + err
    assert not list(deployment.glob("sandboxes/*"))
