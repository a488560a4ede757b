"""Whole orchestrations against the E2B wire server while things go wrong on the wire."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import pytest

from sandbox_pipeline.orchestrating import begin
from sandbox_pipeline.reaper import reap
from sandbox_pipeline.records import Fork, Lease, SandboxState
from sandbox_pipeline.testing import drive
from tests.faults.truth import CANARY, driven, fields, opened
from tests.servers.e2b_server import E2BServer, Fault, Limits, api_error

CREATE: dict[str, Any] = {"method": "POST", "path": "/v2/sandboxes"}
KILL: dict[str, Any] = {"method": "DELETE", "path": "/sandboxes/.*"}


@pytest.fixture
async def server() -> AsyncIterator[E2BServer]:
    async with E2BServer() as running:
        yield running


def creates(server: E2BServer) -> int:
    return len(server.ledger.requests("POST", "/v2/sandboxes"))


RETRY_AFTER_2 = api_error(429, "slow", **CREATE, headers={"retry-after": "2"})
RETRY_AFTER_120 = api_error(429, "slow", **CREATE, headers={"retry-after": "120"}, times=0)
MALFORMED: dict[str, Any] = {**CREATE, "when": "after", "status": 201}


@pytest.mark.parametrize(
    ("row", "fault", "outcome", "failure_class", "posts"),
    [
        ("2", api_error(400, "bad request", **CREATE, times=0), "failed", "config", 1),
        ("2", api_error(404, "no template", **CREATE, times=0), "failed", "config", 1),
        ("3", api_error(409, "exists", **CREATE), "success", None, 2),
        ("3", api_error(409, "exists", **CREATE, when="after"), "success", None, 1),
        ("4", RETRY_AFTER_2, "success", None, 2),
        ("4", api_error(429, "slow", **CREATE), "success", None, 2),
        ("4", api_error(429, "slow", **CREATE, times=0), "failed", "rate_limited", 3),
        ("4", RETRY_AFTER_120, "failed", "rate_limited", 1),
        *(
            ("5", api_error(status, "no", **CREATE, times=0), "failed", "creation_failed", 3)
            for status in (500, 502, 503, 504, 529)
        ),
        ("5", api_error(503, "no", **CREATE, times=2), "success", None, 3),
        ("5", api_error(500, "made it", **CREATE, when="after"), "success", None, 1),
        ("7", Fault(**CREATE, when="after", drop=True), "success", None, 1),
        ("7", Fault(**CREATE, drop=True), "success", None, 2),
        ("8", Fault(**MALFORMED, body='{"sandboxID":'), "success", None, 1),
        ("8", Fault(**MALFORMED, body="[]"), "success", None, 1),
        ("8", Fault(**MALFORMED, body=""), "success", None, 1),
        ("19", Fault(**KILL, when="after", status=404, body="{}"), "success", None, 1),
        ("20", api_error(500, "kill", **KILL, times=2), "success", None, 1),
        ("42", Fault(**CREATE, status=500, body="<html>" + "x" * 10_000_000), "success", None, 2),
    ],
)
async def test_one_fork_while_the_wire_misbehaves(
    server: E2BServer, home: Path, repo: Path, row: str, fault: Fault,
    outcome: str, failure_class: str | None, posts: int,
) -> None:  # fmt: skip
    server.faults.add(fault)
    done = await driven(server, home, fields(repo, num_forks=1))
    [found] = done.rows
    assert (found["outcome"], found["failure_class"]) == (outcome, failure_class), found["message"]
    assert creates(server) == found["create_attempts"] == posts
    assert len(server.ledger.created()) == (outcome == "success")
    assert len(str(found["message"])) <= 1000
    if fault is RETRY_AFTER_2:
        assert server.ledger.most_creates_in(2.0) == 1, "the header counts more than our pause"
    if row in ("3", "5", "7", "8"):
        assert server.ledger.requests("GET", "/v2/sandboxes"), "asked what became of it"


@pytest.mark.parametrize("status", [401, 403])
async def test_a_key_that_is_refused_stops_everything_and_is_named(
    server: E2BServer, home: Path, repo: Path, status: int
) -> None:
    """Row 1, and row 42 too: the answer has a secret in it."""
    server.faults.add(Fault(**CREATE, status=status, body=CANARY, times=0))
    done = await driven(server, home, fields(repo, num_forks=5, max_concurrent=1))
    assert creates(server) == 1, "no retry, and none for the other forks"
    assert server.ledger.created() == []
    found = [(row["outcome"], row["failure_class"]) for row in done.rows]
    assert found == [("failed", "auth")] * 5
    assert all("E2B_API_KEY" in str(row["message"]) for row in done.rows)
    assert done.error is not None
    assert done.error.startswith("auth: ")
    assert f"HTTP {status}" in done.error
    assert "E2B_API_KEY" in done.error
    assert done.summary["failed"] == 5


async def test_a_life_that_the_account_may_not_have_is_a_configuration_error(
    home: Path, repo: Path
) -> None:
    async with E2BServer(limits=Limits(max_ttl_seconds=3600)) as server:
        long = {"provider": "e2b", "orphan_grace_seconds": 7200}
        done = await driven(server, home, fields(repo, num_forks=3, sandbox=long, max_concurrent=1))
        assert {(row["outcome"], row["failure_class"]) for row in done.rows} == {
            ("failed", "config")
        }
        assert creates(server) == 1
        assert "greater than 1 hours" in str(done.error)


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_slow_creation_is_reconciled_and_leaves_one_sandbox_at_most(
    server: E2BServer, home: Path, repo: Path, when: Literal["before", "after"]
) -> None:
    """Created by the time we stopped waiting, it is adopted; else another is tried."""
    server.faults.add(Fault(**CREATE, when=when, delay_seconds=4))
    slow = {"provider": "e2b", "start_timeout_seconds": 1.5}
    done = await driven(server, home, fields(repo, num_forks=1, sandbox=slow))
    assert [row["outcome"] for row in done.rows] == ["success"]
    assert server.ledger.requests("GET", "/v2/sandboxes"), "asked what became of it"
    assert creates(server) == (1 if when == "after" else 2)
    assert len(server.ledger.created()) == server.ledger.max_live() == 1


async def test_a_sandbox_that_shows_up_after_we_asked_for_it_ends_with_its_fork(
    server: E2BServer, home: Path, repo: Path
) -> None:
    """The list did not have it yet, and a second one was created for the fork."""
    server.faults.add(Fault(**CREATE, drop=True))
    agent: dict[str, Any] = {"command": "sleep 2", "env_from": []}
    async with opened(home, server.environ) as runtime:
        running = asyncio.create_task(drive(runtime, fields(repo, num_forks=1, agent=agent), "w"))
        while not server.ledger.created(workflow_id="w"):
            await asyncio.sleep(0.02)
        [mine] = server.ledger.entries("created")
        [late] = server.add_rows(1, mine.metadata)
        done = await running
    assert [row["outcome"] for row in done.rows] == ["success"]
    assert late in {entry.sandbox_id for entry in server.ledger.entries("killed")}
    assert server.ledger.live() == []


@pytest.mark.parametrize("when", ["before", "after"])
async def test_connections_that_are_cut_while_the_agent_runs(
    server: E2BServer, home: Path, repo: Path, when: str
) -> None:
    server.faults.add(
        Fault(path="/(files|filesystem|process).*", first=8, times=3, when=when, drop=True)  # pyright: ignore[reportArgumentType]
    )
    agent = {"command": "sh -c 'echo run >> runs; sleep 1; echo end'"}
    # All three may hit the same call of the same fork.
    done = await driven(server, home, fields(repo, agent=agent, retry={"attempts": 4}))
    assert [row["outcome"] for row in done.rows] == ["success"] * 2
    assert [row["insertions"] for row in done.rows] == [1, 1]
    assert [row["agent_attempts"] for row in done.rows] == [1, 1]


async def test_a_sandbox_that_vanishes_under_its_agent_is_lost_alone(
    server: E2BServer, home: Path, repo: Path
) -> None:
    agent = {"command": "sh -c 'echo run >> runs; sleep 3'"}
    async with opened(home, server.environ) as runtime:
        running = asyncio.create_task(drive(runtime, fields(repo, agent=agent), "w"))
        while True:
            forks: list[Fork] = await runtime.store.forks("w")
            if len(forks) == 2 and all(fork.attempts.get("agent") for fork in forks):
                break
            await asyncio.sleep(0.05)
        await asyncio.to_thread(server.vanish, forks[0].sandbox_id or "")
        done = await running
    found = [(row["outcome"], row["failure_class"]) for row in done.rows]
    assert found == [("failed", "sandbox_lost"), ("success", None)]
    assert server.ledger.live() == []


async def test_kills_that_never_work_are_left_to_the_reaper(
    server: E2BServer, home: Path, repo: Path
) -> None:
    server.faults.add(api_error(500, "kill", **KILL, times=0))
    async with opened(home, server.environ) as runtime:
        config = fields(repo, num_forks=1, retry={"max_seconds": 0.05})
        done = await drive(runtime, config, "w")
        assert [row["outcome"] for row in done.rows] == ["success"]
        assert len(server.ledger.live()) == 1
        assert len(await reap(runtime, dry_run=True)) == 1
        server.faults.clear()
        assert len(await reap(runtime)) == 1
        assert server.ledger.live() == []
        assert await reap(runtime) == []


async def test_never_more_than_five_creations_a_second_over_two_runs(
    server: E2BServer, home: Path, repo: Path
) -> None:
    config = fields(
        repo, num_forks=10, max_concurrent=10, agent={"command": "true", "env_from": []},
        rate_limit={"starts": 5, "window_ms": 1000},
    )  # fmt: skip
    async with opened(home, server.environ) as one, opened(home, server.environ) as two:
        await asyncio.gather(drive(one, config, "w"), drive(two, config, "v"))
    assert creates(server) == 20
    assert server.ledger.most_creates_in(1.0) <= 5
    assert server.ledger.live() == []


async def test_the_reaper_leaves_live_forks_and_other_deployments_alone_over_all_pages(
    home: Path, repo: Path
) -> None:
    async with E2BServer(limits=Limits(page_size=3)) as server:
        async with opened(home, server.environ) as runtime, opened(home, server.environ) as second:
            mine = {"app": "sandbox_pipeline", "deployment_id": await runtime.deployment_id()}
            others = server.add_rows(5, {"app": "sandbox_pipeline", "deployment_id": "another"})
            server.add_rows(7, {**mine, "workflow_id": "gone", "lease_id": "nobody"})
            agent: dict[str, Any] = {"command": "sleep 3", "env_from": []}
            running = asyncio.create_task(drive(runtime, fields(repo, agent=agent), "w"))
            while len(server.ledger.live(workflow_id="w")) < 2:
                await asyncio.sleep(0.05)
            import sandbox_pipeline.reaper as module

            age, module.UNKNOWN_GRACE_SECONDS = module.UNKNOWN_GRACE_SECONDS, -1.0
            try:
                both = await asyncio.gather(reap(runtime), reap(second))
            finally:
                module.UNKNOWN_GRACE_SECONDS = age
            assert {item.workflow_id for reaped in both for item in reaped} == {"gone"}
            assert sorted(server.ledger.live(deployment_id="another")) == sorted(others)
            assert server.ledger.live(workflow_id="gone") == []
            done = await running
        assert [row["outcome"] for row in done.rows] == ["success"] * 2


async def test_a_run_that_died_while_creating_is_reconciled_by_the_next(
    server: E2BServer, home: Path, repo: Path
) -> None:
    """The server created, and the worker was gone before it could write the name down."""
    config = fields(repo, num_forks=1)
    async with opened(home, server.environ) as runtime:
        await begin(runtime, config, "w", "run-0")
        server.faults.add(Fault(**CREATE, when="after", delay_seconds=2))
        dying = asyncio.create_task(drive(runtime, config, "w", run_id="run-0"))
        while not server.ledger.created(workflow_id="w"):
            await asyncio.sleep(0.02)
        # As a SIGKILL: nothing that runs afterwards is stored.
        await runtime.store.close()
        await asyncio.wait({dying}, timeout=10)
        dying.exception()
    async with opened(home, server.environ) as runtime:
        leases: list[Lease] = await runtime.store.leases("w")
        assert [lease.state for lease in leases] == [SandboxState.INTENT]
        await begin(runtime, config, "w", "run-2", previous_ended=True)
        done = await drive(runtime, config, "w", run_id="run-2")
    assert [row["outcome"] for row in done.rows] == ["success"]
    assert server.ledger.live() == []
