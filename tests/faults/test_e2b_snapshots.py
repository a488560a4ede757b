"""Prepared once and copied, at an E2B that can't copy, or where the copy is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.orchestrating import begin
from sandbox_pipeline.records import Orchestration, orchestration_key
from sandbox_pipeline.sandboxes.base import Discarding
from sandbox_pipeline.testing import drive
from tests.faults.truth import check, driven, fields, opened
from tests.servers.e2b_server import E2BServer, api_error

SNAPSHOT: dict[str, Any] = {"method": "POST", "path": "/sandboxes/.*/snapshots", "times": 0}


@pytest.fixture
async def server() -> AsyncIterator[E2BServer]:
    async with E2BServer() as running:
        yield running


def prepared(repo: Path, **changes: Any) -> OrchestrationConfig:
    """Forks whose patch tells how often `setup_command` ran in their sandbox."""
    agent: dict[str, Any] = {"command": "cp ../setup seen", "env_from": []}
    return fields(repo, setup_command="echo once >> ../setup", agent=agent, **changes)


@pytest.mark.parametrize("status", [404, 501, 500])
async def test_without_snapshots_each_fork_prepares_itself(
    server: E2BServer, home: Path, repo: Path, status: int
) -> None:
    server.faults.add(api_error(status, "no such route", **SNAPSHOT))
    done = await driven(server, home, prepared(repo))
    assert [(row["outcome"], row["insertions"]) for row in done.rows] == [("success", 1)] * 2
    assert len(server.ledger.created()) == 3, "one to prepare, which ended, and two forks"
    assert server.ledger.live() == []


async def test_a_snapshot_that_is_gone_is_replaced_by_the_setup_itself(
    server: E2BServer, home: Path, repo: Path
) -> None:
    """Somebody deletes the template between its creation and the forks; verification too."""
    config = prepared(repo, verify_command="test -s ../setup")
    async with opened(home, server.environ) as runtime:
        await begin(runtime, config, "w", "run-1")
        stored = await runtime.store.need(Orchestration, orchestration_key("w"))
        provider = runtime.provider("e2b")
        assert isinstance(provider, Discarding)
        assert stored.base_snapshot is not None
        await provider.discard(stored.base_snapshot)
        done = await drive(runtime, config, "w")
        await check(runtime, home, 2)
        events = await runtime.store.events("w")
    assert [(row["outcome"], row["insertions"]) for row in done.rows] == [("success", 1)] * 2
    assert [row["verification"] for row in done.rows] == ["verified"] * 2
    assert [row["create_attempts"] for row in done.rows] == [2, 2]
    told = [event.payload["reason"] for event in events if event.name == "sandbox-creation-failed"]
    assert len(told) == 2
    assert all(stored.base_snapshot in reason for reason in told)
    assert server.ledger.live() == []


async def test_a_setup_that_needs_more_network_than_the_forks_have_is_said(
    server: E2BServer, home: Path, repo: Path
) -> None:
    server.faults.add(api_error(404, "no such route", **SNAPSHOT))
    config = prepared(repo, sandbox={"provider": "e2b", "setup_network": "full"})
    done = await driven(server, home, config)
    assert [row["failure_class"] for row in done.rows] == ["setup_failed"] * 2
    assert "set sandbox.network to full" in str(done.error)
    assert len(server.ledger.created()) == 1, "no fork is started in vain"
