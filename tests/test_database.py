"""Transactions run at once where nobody is in the way, and never stop the event loop."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sandbox_pipeline.errors import StoreError
from sandbox_pipeline.store import database
from sandbox_pipeline.store.database import Database, database_of
from sandbox_pipeline.store.engine import open_engine

MINE = "an error of the transaction's own"
COUNT = sa.text("SELECT count(*) FROM pipeline_events")
ADD = sa.text(
    "INSERT INTO pipeline_events (workflow_id, name, time, payload) VALUES ('w', 'n', 0, '{}')"
)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "s.db"


@pytest.fixture
async def opened(file: Path) -> AsyncIterator[Database]:
    made = database_of(open_engine(f"sqlite:///{file}"))
    yield made
    made.close()


def count(connection: Connection) -> int:
    return int(connection.execute(COUNT).scalar_one())


def add(connection: Connection) -> int:
    connection.execute(ADD)
    return threading.get_ident()


async def counted(opened: Database) -> int:
    return await opened.run(count, write=False, short=True)


async def test_a_short_transaction_runs_at_once_and_a_long_one_in_a_thread(
    opened: Database,
) -> None:
    assert await opened.run(add, write=True, short=True) == threading.get_ident()
    assert await opened.run(add, write=True, short=False) != threading.get_ident()
    assert await counted(opened) == 2


async def test_while_another_process_writes_a_write_waits_in_a_thread(
    opened: Database, file: Path
) -> None:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(opened.run(add, write=True, short=True))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    assert await counted(opened) == 0, "reads go on"
    other.execute("COMMIT")
    other.close()
    assert await waiting != threading.get_ident()
    assert await counted(opened) == 1


async def test_what_raises_leaves_nothing_and_the_next_one_works(opened: Database) -> None:
    def fail(connection: Connection) -> None:
        add(connection)
        raise KeyError(MINE)

    for short in (True, False):
        with pytest.raises(KeyError, match=MINE):
            await opened.run(fail, write=True, short=short)
        assert await counted(opened) == 0
        with pytest.raises(StoreError, match="no such table: nowhere"):
            await opened.run(
                lambda it: it.execute(sa.text("SELECT 1 FROM nowhere")), write=False, short=short
            )
    await opened.run(add, write=True, short=True)
    assert await counted(opened) == 1


async def test_another_loop_of_the_process_never_shares_the_loops_connection(
    opened: Database,
) -> None:
    await counted(opened)

    async def elsewhere() -> tuple[int, int]:
        return await opened.run(add, write=True, short=True), threading.get_ident()

    worked, asked = await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    assert worked not in (asked, threading.get_ident())


async def test_the_log_does_not_grow_for_ever(opened: Database, file: Path) -> None:
    threads: list[int] = []
    for _ in range(5 * (database.WRITES_AT_ONCE + 1)):
        threads.append(await opened.run(add, write=True, short=True))
    elsewhere = [it for it in threads if it != threading.get_ident()]
    assert len(elsewhere) == 5
    # 1,000 pages are when SQLite moves them, and some 256 writes come before it is asked to.
    assert file.with_name("s.db-wal").stat().st_size < 4096 * (1000 + 6 * 256)
    assert await counted(opened) == len(threads)


async def test_a_database_in_memory_is_one() -> None:
    made = database_of(open_engine("sqlite:///:memory:"))
    try:
        await made.run(add, write=True, short=True)
        await made.run(add, write=True, short=False)
        assert await counted(made) == 2
    finally:
        made.close()
