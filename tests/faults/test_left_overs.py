"""What the reaper takes for a left-over, and what it must leave alone."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from pathlib import Path

import dagster as dg
import pytest

from sandbox_pipeline import verification
from sandbox_pipeline.clock import Instant, now
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.defs.guard import guarded
from sandbox_pipeline.leasing import new_lease
from sandbox_pipeline.orchestrating import begin
from sandbox_pipeline.ownership import is_dead
from sandbox_pipeline.reaper import LEFT, OVER, reap
from sandbox_pipeline.records import Orchestration, orchestration_key
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.testing import drive
from tests.faults.truth import check, fields, opened
from tests.processes import live_sandboxes
from tests.servers.e2b_server import E2BServer, api_error
from tests.servers.e2b_server.faults import Fault

PROVIDERS = pytest.mark.parametrize("provider", ["local", "e2b"])
KEY = orchestration_key("w")


class Truth:
    """What the provider really has."""

    def __init__(self, home: Path, server: E2BServer | None) -> None:
        self._home = home
        self.server = server

    @property
    def environ(self) -> dict[str, str]:
        return {} if self.server is None else dict(self.server.environ)

    def sandboxes(self) -> list[str]:
        return live_sandboxes(self._home) if self.server is None else self.server.ledger.live()

    def snapshots(self) -> list[str]:
        if self.server is not None:
            return self.server.ledger.snapshots()
        return sorted(path.name for path in self._home.glob("sandboxes/bases/*"))


@pytest.fixture
async def truth(home: Path, provider: str) -> AsyncGenerator[Truth]:
    if provider == "local":
        yield Truth(home, None)
        return
    async with E2BServer() as server:
        yield Truth(home, server)
        assert server.ledger.live() == []


def config_of(provider: str, repo: Path) -> OrchestrationConfig:
    return fields(
        repo,
        num_forks=2,
        setup_command="echo made > ../made",
        health_check={"command": "test -s ../made"},
        sandbox={"provider": provider, "orphan_grace_seconds": 60},
    )


async def stored(runtime: Runtime) -> Orchestration:
    return await runtime.store.need(Orchestration, KEY)


async def owner_was_last_seen(runtime: Runtime, seconds_ago: float, *, alive: bool = False) -> None:
    """Make the owner's worker one that is no more, or at least was silent since then."""
    moment = now()
    seen = Instant(
        wall=moment.wall - seconds_ago,
        monotonic=moment.monotonic - seconds_ago,
        boot=moment.boot,
    )
    changes = {"heartbeat": seen} if alive else {"heartbeat": seen, "pid_started": "0"}

    def change(it: Orchestration) -> Orchestration:
        assert it.owner is not None
        return it.evolve(owner=it.owner.model_copy(update=changes))

    await runtime.store.update(Orchestration, KEY, change)


@contextlib.asynccontextmanager
async def fresh(runtime: Runtime, fork_num: int) -> AsyncGenerator[None]:
    """A sandbox as verification and publishing make it."""
    orchestration = await stored(runtime)
    fork = (await runtime.store.forks("w"))[fork_num]
    lease = await verification.admitted(runtime, orchestration, fork, "run-1")
    assert lease is not None
    async with verification.fresh_sandbox(runtime, orchestration, lease, "none"):
        yield


@PROVIDERS
async def test_sandboxes_of_a_living_run_are_left_alone_also_after_the_orchestrations_end(
    home: Path, repo: Path, provider: str, truth: Truth
) -> None:
    async with opened(home, truth.environ) as runtime, opened(home, truth.environ) as other:
        config = config_of(provider, repo)
        await begin(runtime, config, "w", "run-1")
        orchestration = await stored(runtime)
        base = new_lease(orchestration, "run-1", fork_num=None, attempt=9)
        assert await runtime.store.admit(base, 9) is not None
        async with fresh(runtime, 0):
            assert await reap(other) == [], "verify and base, while it works"
            assert len(truth.sandboxes()) == 1
        done = await drive(runtime, config, "w")
        assert [row["outcome"] for row in done.rows] == ["success"] * 2
        async with fresh(runtime, 1):
            assert await reap(other) == [], "publishing, after the end"
            assert len(truth.sandboxes()) == 1
            await owner_was_last_seen(runtime, 0)
            assert [item.reason for item in await reap(other)] == [OVER]
            assert truth.sandboxes() == []


@pytest.mark.parametrize("provider", ["local"])
async def test_a_run_that_publishes_shows_that_it_lives(
    home: Path, repo: Path, provider: str, truth: Truth
) -> None:
    async with opened(home, truth.environ) as runtime:
        await drive(runtime, config_of(provider, repo), "w")
        async with fresh(runtime, 0):
            await owner_was_last_seen(runtime, 3600, alive=True)
            assert is_dead((await stored(runtime)).owner)  # pyright: ignore[reportArgumentType]
            with dg.DagsterInstance.get() as instance:

                def watch() -> None:
                    with guarded(instance, "run-1"):
                        for _ in range(100):
                            if not asyncio.run(_owner_is_dead(home)):
                                return

                await asyncio.to_thread(watch)
            assert await reap(runtime) == []


async def _owner_is_dead(home: Path) -> bool:
    async with opened(home, {}) as runtime:
        owner = (await stored(runtime)).owner
        await asyncio.sleep(0.1)
        return owner is None or is_dead(owner)


@PROVIDERS
async def test_the_prepared_workspace_of_a_run_that_nobody_resumes_is_removed(
    home: Path, repo: Path, provider: str, truth: Truth
) -> None:
    """Not before its sandboxes would have ended; a resume after that prepares anew."""
    async with opened(home, truth.environ) as runtime:
        config = config_of(provider, repo)
        await begin(runtime, config, "w", "run-1")
        assert len(truth.snapshots()) == 1
        assert await reap(runtime) == []
        await owner_was_last_seen(runtime, 30)
        assert await reap(runtime) == [], "a resume may still want it"
        await owner_was_last_seen(runtime, 61)
        assert [item.reason for item in await reap(runtime, dry_run=True)] == [LEFT]
        assert len(truth.snapshots()) == 1
        assert [item.reason for item in await reap(runtime)] == [LEFT]
        assert truth.snapshots() == []
        assert await reap(runtime) == []
        done = await drive(runtime, config, "w", run_id="run-2")
        await check(runtime, home, 2)
    assert [row["outcome"] for row in done.rows] == ["success"] * 2
    assert truth.snapshots() == []


@pytest.mark.parametrize("provider", ["e2b"])
async def test_one_that_could_not_be_removed_at_the_end_is_removed_by_the_reaper(
    home: Path, repo: Path, provider: str, truth: Truth
) -> None:
    assert truth.server is not None
    async with opened(home, truth.environ) as runtime:
        truth.server.faults.add(api_error(500, method="DELETE", path="/templates/.*", times=0))
        await drive(runtime, config_of(provider, repo), "w")
        assert (await stored(runtime)).complete
        assert len(truth.snapshots()) == 1
        assert await reap(runtime) == [], "still not possible"
        truth.server.faults.clear()
        assert [item.reason for item in await reap(runtime)] == [OVER]
        assert truth.snapshots() == []
        assert await runtime.store.with_snapshots() == []


@pytest.mark.parametrize("provider", ["e2b"])
async def test_snapshots_whose_answers_were_lost_are_removed_with_their_sandbox(
    home: Path, repo: Path, provider: str, truth: Truth
) -> None:
    assert truth.server is not None
    async with opened(home, truth.environ) as runtime:
        path = "/sandboxes/.*/snapshots"
        truth.server.faults.add(Fault(method="POST", path=path, when="after", drop=True))
        await drive(runtime, config_of(provider, repo), "w")
        assert len(truth.server.ledger.entries("snapshot")) == 2, "it was taken twice"
        assert truth.snapshots() == []


@PROVIDERS
async def test_a_snapshot_taken_right_before_a_crash_is_removed_with_its_sandbox(
    home: Path, repo: Path, provider: str, truth: Truth
) -> None:
    """The worker dies between the provider's answer and the store's write."""
    async with opened(home, truth.environ) as runtime:
        running = asyncio.create_task(begin(runtime, config_of(provider, repo), "w", "run-1"))
        while not truth.snapshots():
            await asyncio.sleep(0.001)
        # As a SIGKILL: nothing that runs afterwards is stored.
        await runtime.store.close()
        await asyncio.wait({running})
        running.exception()
    async with opened(home, truth.environ) as runtime:
        assert (await stored(runtime)).base_snapshot is None
        await owner_was_last_seen(runtime, 0)
        assert [item.reason for item in await reap(runtime)] == [LEFT]
    assert truth.snapshots() == []
    assert truth.sandboxes() == []
