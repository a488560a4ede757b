"""This machine's own troubles: its store, its clock, its death."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from sqlalchemy.engine import Connection

from sandbox_pipeline import demo, launch
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import StoreError
from sandbox_pipeline.instance import ensure_home
from sandbox_pipeline.ownership import is_dead
from sandbox_pipeline.records import Lease, Orchestration, SandboxState, orchestration_key
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.store import Store
from sandbox_pipeline.store.engine import open_engine
from sandbox_pipeline.testing import FakeAgent, FaultyProvider, drive
from tests.processes import live_sandboxes, wait_until_gone
from tests.test_cli import cli
from tests.webserver import running_webserver

Make = Callable[..., OrchestrationConfig]


class FullDisk(Store):
    """Refuses to write down that a sandbox lives, as a full disk would."""

    refusing = True

    async def update(self, record_type: Any, key: str, change: Any, *rest: Any, **more: Any) -> Any:
        def checked(record: Any) -> Any:
            changed = change(record)
            live = isinstance(changed, Lease) and changed.state is SandboxState.LIVE
            if live and self.refusing:
                msg = "state store: database or disk is full; free some disk space"
                raise StoreError(msg)
            return changed

        return await super().update(record_type, key, checked, *rest, **more)


async def test_a_sandbox_that_cannot_be_written_down_is_ended_and_the_run_fails(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    full = FullDisk(open_engine(runtime.settings.db_url))
    other = Runtime(
        full,
        runtime.settings,
        runtime.environ,
        providers={"local": provider},
        agents={"fake": FakeAgent()},
    )
    try:
        with pytest.raises(StoreError, match="disk is full"):
            await drive(other, config(num_forks=1), "w")
        assert len(provider.ledger.created) == 1
        assert provider.ledger.alive == []
        full.refusing = False
        done = await drive(other, config(num_forks=1), "w")
        assert done.summary["succeeded"] == 1
        assert provider.ledger.alive == []
    finally:
        await other.close()


@pytest.mark.parametrize("hours", [1, -1])
async def test_a_clock_that_is_set_changes_no_duration_and_kills_no_owner(
    runtime: Runtime, config: Make, monkeypatch: pytest.MonkeyPatch, hours: int
) -> None:
    real, began = time.time, time.monotonic()

    def jumping() -> float:
        return real() + (hours * 3600 if time.monotonic() - began > 0.3 else 0)

    monkeypatch.setattr(time, "time", jumping)
    limit = {"starts": 2, "window_ms": 200}
    done = await drive(runtime, config(num_forks=4, max_concurrent=1, rate_limit=limit), "w")
    assert done.summary["succeeded"] == 4
    assert float(done.summary["wall_seconds"] or -1) < 60
    assert all(0 <= float(row["total_seconds"]) < 60 for row in done.rows)
    stored = await runtime.store.need(Orchestration, orchestration_key("w"))
    assert stored.owner is not None
    assert not is_dead(stored.owner)


async def test_writes_of_two_processes_on_a_busy_store_are_none_of_them_lost(
    runtime: Runtime, config: Make
) -> None:
    """A writer that holds the database for a while only makes the others wait."""
    blocker = open_engine(runtime.settings.db_url)

    def hold() -> None:
        with blocker.connect() as plain:
            connection: Connection = plain.execution_options(write=True)
            with connection.begin():
                time.sleep(2)

    holding = asyncio.create_task(asyncio.to_thread(hold))
    done = await drive(runtime, config(num_forks=3), "w")
    await holding
    blocker.dispose()
    assert done.summary["succeeded"] == 3


@pytest.mark.campaign
@pytest.mark.timeout(600)
def test_after_the_whole_tree_was_killed_a_restart_finishes_the_orchestration(
    tmp_path: Path, home: Path
) -> None:
    ensure_home(home)
    agent = {"command": "sh -c 'echo run >> runs; sleep 30'"}
    config = {**demo.CONFIG, "workflow_id": "w", "num_forks": 2, "agent": agent}
    first = tmp_path / "first"
    first.mkdir()
    with running_webserver(home, first) as server:
        run_id = launch(config, url=server.url)
        _until(lambda: len(live_sandboxes(home)) == 2 and _stages() == ["agent", "agent"])
        tree = [
            process
            for process in psutil.Process(server.process.pid).children(recursive=True)
            if "supervisor.py" not in " ".join(process.cmdline())
        ]
        for process in tree:
            process.kill()
        os.kill(server.process.pid, signal.SIGKILL)
        server.process.wait()
    assert len(live_sandboxes(home)) == 2
    second = tmp_path / "second"
    second.mkdir()
    with running_webserver(home, second) as server:
        server.wait_for_status(run_id, "FAILURE", seconds=150)
        _until(lambda: _status()["state"] == "complete", seconds=200)
        assert _status()["run_id"] != run_id
    rows = json.loads(cli("show", "w", "--json").stdout)["forks"]
    assert [(row["outcome"], row["insertions"]) for row in rows] == [("success", 1)] * 2
    assert wait_until_gone(home, 60) == []


def _status() -> dict[str, Any]:
    done = cli("status", "w", "--json")
    return json.loads(done.stdout) if done.stdout else {"forks": [], "state": ""}


def _stages() -> list[str]:
    return [fork["stage"] for fork in _status()["forks"]]


def _until(condition: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.3)
