"""The store fails right after a creation: the sandbox that nobody could write down is ended."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy.engine import Connection

from sandbox_pipeline.errors import StoreError
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.settings import Settings
from sandbox_pipeline.store import Store
from sandbox_pipeline.store.engine import open_engine
from sandbox_pipeline.testing import drive
from tests.faults.truth import CANARY, check, fields
from tests.servers.e2b_server import E2BServer
from tests.servers.e2b_server.faults import Fault, api_error

T = TypeVar("T")
CREATE: dict[str, Any] = {"method": "POST", "path": "/v2/sandboxes"}
KILL: dict[str, Any] = {"method": "DELETE", "path": "/sandboxes/.*"}


class FailingStore(Store):
    """Takes no write as long as `fails` says so; reads go on."""

    def __init__(self, url: str) -> None:
        super().__init__(open_engine(url))
        self.fails: Callable[[], bool] = lambda: False

    async def _run(
        self, work: Callable[[Connection], T], *, write: bool = True, short: bool = True
    ) -> T:
        if write and self.fails():
            msg = "state store: database or disk is full; free some disk space"
            raise StoreError(msg)
        return await super()._run(work, write=write, short=short)


def opened(home: Path, server: E2BServer) -> tuple[Runtime, FailingStore]:
    environ = {**os.environ, **server.environ, "CANARY": CANARY}
    settings = Settings.from_environ(environ, home=home)
    store = FailingStore(settings.db_url)
    return Runtime(store, settings, environ), store


@pytest.mark.parametrize(
    "faults",
    [
        [],
        [api_error(500, times=2, **KILL)],
        [Fault(**CREATE, when="after", drop=True)],
        [Fault(**CREATE, when="after", status=201, body="{"), api_error(503, times=1, **KILL)],
    ],
    ids=["answered", "kill fails twice", "answer dropped", "answer unreadable, kill fails"],
)
async def test_the_sandbox_is_ended_and_the_next_run_goes_on(
    home: Path, repo: Path, faults: list[Fault]
) -> None:
    config = fields(repo, num_forks=1, retry={"initial_seconds": 0.01, "max_seconds": 0.1})
    async with E2BServer() as server:
        runtime, store = opened(home, server)
        try:
            server.faults.add(*faults)
            store.fails = lambda: bool(server.ledger.created())
            with pytest.raises(StoreError, match="disk is full"):
                await drive(runtime, config, "w")
            assert len(server.ledger.created()) == 1
            assert server.ledger.live() == [], "ended at once, not by its time-to-live"
            store.fails = lambda: False
            server.faults.clear()
            done = await drive(runtime, config, "w")
            await check(runtime, home, 1)
        finally:
            await runtime.close()
        assert [row["outcome"] for row in done.rows] == ["success"]
        assert server.ledger.live() == []


async def test_one_that_cannot_be_ended_either_ends_by_its_time_to_live(
    home: Path, repo: Path
) -> None:
    config = fields(
        repo,
        num_forks=1,
        sandbox={"orphan_grace_seconds": 10},
        retry={"initial_seconds": 0.01, "max_seconds": 0.1},
    )
    async with E2BServer() as server:
        runtime, store = opened(home, server)
        try:
            server.faults.add(api_error(500, times=0, **KILL))
            store.fails = lambda: bool(server.ledger.created())
            with pytest.raises(StoreError, match="disk is full"):
                await drive(runtime, config, "w")
        finally:
            await runtime.close()
        await server.ended(server.ledger.created(), seconds=20)
        assert [entry.kind for entry in server.ledger.entries("expired")] == ["expired"]
