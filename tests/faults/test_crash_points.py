"""SIGKILL of the worker before and after its n-th write or provider call, then again."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy.engine import Connection

from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.records import Outcome
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import SandboxProvider
from sandbox_pipeline.sandboxes.local import LocalProvider
from sandbox_pipeline.settings import Settings
from sandbox_pipeline.store import Store
from sandbox_pipeline.store.engine import open_engine
from sandbox_pipeline.testing import FaultyProvider, drive
from tests.faults.truth import CANARY, check, fields
from tests.processes import wait_until_gone
from tests.servers.e2b_server import E2BServer

T = TypeVar("T")
MOST = 400


class Countdown:
    """Kills this process at a moment that is named by a number."""

    def __init__(self, moment: int) -> None:
        self._left = moment

    def tick(self) -> None:
        self._left -= 1
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class DyingStore(Store):
    """Ticks before and after each transaction that writes."""

    countdown: Countdown

    async def _run(
        self, work: Callable[[Connection], T], *, write: bool = True, short: bool = True
    ) -> T:
        if not write:
            return await super()._run(work, write=False, short=short)
        self.countdown.tick()
        done = await super()._run(work, short=short)
        self.countdown.tick()
        return done


class DyingProvider(FaultyProvider):
    """Ticks before and after each call."""

    countdown: Countdown

    async def call(self, operation: str, work: Callable[[], Awaitable[T]]) -> T:
        self.countdown.tick()
        done = await super().call(operation, work)
        self.countdown.tick()
        return done


def worker(home: Path, config: OrchestrationConfig, environ: dict[str, str], moment: int) -> int:
    """Run the orchestration in a process that dies; its exit status, negative for a signal."""
    # Not forked: the threads of this process (the server, and those of the SDK's network
    # library once it was used) would be missing in the child, which then waits for them.
    process = multiprocessing.get_context("spawn").Process(
        target=_work, args=(home, config, environ, moment)
    )
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


def _work(home: Path, config: OrchestrationConfig, environ: dict[str, str], moment: int) -> None:
    os.dup2(os.open(home / "worker.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    asyncio.run(_drive(home, config, environ, moment))


async def _drive(
    home: Path, config: OrchestrationConfig, environ: dict[str, str], moment: int
) -> None:
    countdown = Countdown(moment)
    settings = Settings.from_environ(environ, home=home)
    store = DyingStore(open_engine(settings.db_url))
    store.countdown = countdown
    name = config.sandbox.provider
    provider = DyingProvider(_provider(name, home, environ))
    provider.countdown = countdown
    runtime = Runtime(store, settings, environ, providers={name: provider})
    try:
        await drive(runtime, config, "w", run_id=f"run-{os.getpid()}")
    finally:
        await runtime.close()


def _provider(name: str, home: Path, environ: dict[str, str]) -> SandboxProvider:
    if name == "local":
        return LocalProvider(home / "sandboxes")
    from sandbox_pipeline.sandboxes.e2b import E2BProvider

    return E2BProvider.from_environ(environ)


@pytest.fixture
def server() -> Iterator[E2BServer]:
    with E2BServer() as running:
        yield running


def _survives(home: Path, repo: Path, provider: str, server: E2BServer, moment: int) -> bool:
    """Die at the moment, run again, check; whether the moment came at all."""
    environ = {**os.environ, **server.environ, "CANARY": CANARY}
    changes: dict[str, Any] = {"provider": provider, "orphan_grace_seconds": 60}
    config = fields(repo, num_forks=1, sandbox=changes, retry={"max_seconds": 0.1})
    died = worker(home, config, environ, moment) == -signal.SIGKILL
    if died:
        # The next worker is this process: starting another one would only take its time.
        asyncio.run(_drive(home, config, environ, 0))
    asyncio.run(_judge(home, environ))
    assert wait_until_gone(home, 10) == []
    deadline = time.monotonic() + 10
    while server.ledger.live() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.ledger.live() == []
    assert server.ledger.max_live() <= 1, "a fork has one sandbox"
    return died


async def _judge(home: Path, environ: dict[str, str]) -> None:
    runtime = Runtime.open(home=home, environ=environ)
    try:
        await check(runtime, home, 1)
        [fork] = await runtime.store.forks("w")
        assert fork.outcome is Outcome.SUCCESS, fork.message
        names = [event.name for event in await runtime.store.events("w")]
        assert names.count("agent-completed") == 1
        assert "agent-retried" not in names, "an agent that runs is followed, not run again"
    finally:
        await runtime.close()


@pytest.mark.parametrize("provider", ["local", "e2b"])
@pytest.mark.parametrize("moment", [3, 9, 14, 18, 22, 27, 33, 41, 52, 64])
def test_the_worker_dies_at_one_of_some_moments(
    home: Path, repo: Path, server: E2BServer, provider: str, moment: int
) -> None:
    _survives(home, repo, provider, server, moment)


@pytest.mark.campaign
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("provider", ["local", "e2b"])
def test_the_worker_dies_at_every_moment(
    tmp_path: Path, home: Path, repo: Path, server: E2BServer, provider: str
) -> None:
    for moment in range(1, MOST):
        place = tmp_path / f"at-{moment}"
        place.mkdir()
        if not _survives(place, repo, provider, server, moment):
            return
    pytest.fail("there is no end of moments")
