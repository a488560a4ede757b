"""A cancel of a whole orchestration while its agents work: what they did is kept, none lives on."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest

from sandbox_pipeline.clock import now
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.orchestrating import settle_cancelled
from sandbox_pipeline.ownership import process_started
from sandbox_pipeline.reaper import CANCELLED, ask_to_cancel, reap
from sandbox_pipeline.records import (
    AgentResult,
    Fork,
    Orchestration,
    Outcome,
    Usage,
    fork_key,
    orchestration_key,
)
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import WORKSPACE
from sandbox_pipeline.testing import drive
from tests.faults.truth import check, fields, opened
from tests.processes import live_sandboxes
from tests.servers.e2b_server import E2BServer
from tests.servers.e2b_server.faults import Fault

PROVIDERS = pytest.mark.parametrize("provider", ["local", "e2b"])
AGENT = "sh -c 'echo half > work; echo $CANARY > leak; sleep 600'"
STUBBORN = "sh -c 'trap : INT TERM; echo half > work; while :; do sleep 1; done'"


@contextlib.asynccontextmanager
async def cloud_of(provider: str) -> AsyncGenerator[E2BServer | None]:
    if provider == "local":
        yield None
        return
    async with E2BServer() as server:
        yield server
        assert server.ledger.live() == []


def config_of(provider: str, repo: Path, agent: str = AGENT) -> OrchestrationConfig:
    return fields(
        repo,
        num_forks=3,
        max_concurrent=2,
        agent={"command": agent, "timeout_seconds": 600},
        sandbox={"provider": provider, "orphan_grace_seconds": 60},
    )


async def at_work(runtime: Runtime, count: int = 2) -> None:
    """Until so many agents have written into their workspace."""
    forks: list[Fork] = []
    while len(forks) < count:
        await asyncio.sleep(0.05)
        forks = [fork for fork in await runtime.store.forks("w") if fork.attempts.get("agent")]
    for fork in forks:
        sandbox = await runtime.provider(fork.provider or "").connect(fork.sandbox_id or "")
        while True:
            with contextlib.suppress(FileNotFoundError):
                if await sandbox.read(f"{WORKSPACE}/work"):
                    break
            await asyncio.sleep(0.05)


def environ_of(server: E2BServer | None) -> dict[str, str]:
    return {} if server is None else dict(server.environ)


async def interrupted(running: asyncio.Task[object]) -> None:
    running.cancel()
    await asyncio.wait({running})


@PROVIDERS
@pytest.mark.parametrize("agent", [AGENT, STUBBORN])
async def test_the_patches_of_agents_at_work_are_kept(
    home: Path, repo: Path, provider: str, agent: str
) -> None:
    async with cloud_of(provider) as server:
        async with opened(home, environ_of(server)) as runtime:
            config = config_of(provider, repo, agent)
            running = asyncio.create_task(drive(runtime, config, "w"))
            await at_work(runtime)
            await interrupted(running)
            assert await settle_cancelled(runtime, "run-1") == ["w"]
            forks = await runtime.store.forks("w")
            await check(runtime, home, 3)
        assert [fork.outcome for fork in forks] == [Outcome.CANCELLED] * 3
        kept = sorted(fork.patch.insertions if fork.patch else 0 for fork in forks)
        assert kept == ([0, 2, 2] if agent is AGENT else [0, 1, 1])
    assert live_sandboxes(home) == []


async def test_a_result_that_was_saved_before_its_patch_stays_what_it_is(
    home: Path, repo: Path
) -> None:
    async with opened(home, {}) as runtime:
        running = asyncio.create_task(drive(runtime, config_of("local", repo), "w"))
        await at_work(runtime)
        await interrupted(running)
        first = next(it for it in await runtime.store.forks("w") if it.attempts.get("agent"))
        result = AgentResult(outcome=Outcome.SUCCESS, usage=Usage(cost_usd=0.5))
        await runtime.store.update(
            Fork, fork_key("w", first.fork_num), lambda it: it.evolve(result=result)
        )
        await settle_cancelled(runtime, "run-1")
        fork = (await runtime.store.forks("w"))[first.fork_num]
        await check(runtime, home, 3)
    assert (fork.outcome, fork.patch and fork.patch.insertions) == (Outcome.SUCCESS, 2)
    assert fork.result == result


async def test_sandboxes_that_do_not_answer_hold_no_cancel_up(home: Path, repo: Path) -> None:
    async with E2BServer() as server:
        async with opened(home, server.environ) as runtime:
            running = asyncio.create_task(drive(runtime, config_of("e2b", repo), "w"))
            await at_work(runtime)
            await interrupted(running)
            server.faults.add(Fault(path="/process.Process/.*", times=0, delay_seconds=3600))
            async with asyncio.timeout(30):
                await settle_cancelled(runtime, "run-1")
            assert server.ledger.live() == []
            forks = await runtime.store.forks("w")
            await check(runtime, home, 3)
        assert [fork.outcome for fork in forks] == [Outcome.CANCELLED] * 3


@PROVIDERS
async def test_the_reaper_keeps_them_too_where_the_worker_is_dead(
    home: Path, repo: Path, provider: str
) -> None:
    async with cloud_of(provider) as server:
        environ = environ_of(server)
        async with opened(home, environ) as runtime, opened(home, environ) as other:
            running = asyncio.create_task(drive(runtime, config_of(provider, repo), "w"))
            await at_work(runtime)
            await interrupted(running)
            await ask_to_cancel(runtime, "run-1")
            assert await reap(runtime) == [], "its worker is alive and will do it"
            await runtime.store.update(Orchestration, orchestration_key("w"), _without_process)
            both = await asyncio.gather(reap(runtime), reap(other))
            forks = await runtime.store.forks("w")
            await check(runtime, home, 3)
        assert {item.reason for reaped in both for item in reaped} == {CANCELLED}
        kept = sorted(fork.patch.insertions if fork.patch else 0 for fork in forks)
        assert kept == [0, 2, 2]
    assert live_sandboxes(home) == []


def _without_process(orchestration: Orchestration) -> Orchestration:
    """As if the owner had been a process that is no more."""
    assert orchestration.owner is not None
    assert process_started(os.getpid()) == orchestration.owner.pid_started
    gone = {"pid_started": "0", "heartbeat": now()}
    return orchestration.evolve(owner=orchestration.owner.model_copy(update=gone))
