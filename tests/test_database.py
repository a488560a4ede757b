"""Short reads run at once; nothing that may wait stops the event loop."""

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
    await counted(made)
    yield made
    made.close()


def count(connection: Connection) -> int:
    return int(connection.execute(COUNT).scalar_one())


def add(connection: Connection) -> int:
    connection.execute(ADD)
    return threading.get_ident()


async def counted(opened: Database) -> int:
    return await opened.run(count, write=False, short=True)


def where(connection: Connection) -> int:
    count(connection)
    return threading.get_ident()


async def test_a_short_read_runs_at_once_and_all_else_in_a_thread(opened: Database) -> None:
    here = threading.get_ident()
    assert await opened.run(where, write=False, short=True) == here
    assert await opened.run(where, write=False, short=False) != here
    assert await opened.run(add, write=True, short=True) != here
    assert await counted(opened) == 1


async def test_while_another_process_writes_reads_go_on(opened: Database, file: Path) -> None:
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(opened.run(add, write=True, short=True))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    assert await counted(opened) == 0
    other.execute("COMMIT")
    other.close()
    await waiting
    assert await counted(opened) == 1


async def test_to_open_a_file_that_is_taken_waits_in_a_thread(file: Path) -> None:
    made = database_of(open_engine(f"sqlite:///{file}"))
    other = sqlite3.connect(file, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN IMMEDIATE")
    waiting = asyncio.create_task(counted(made))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    other.close()
    assert await waiting == 0
    made.close()


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
        return await opened.run(where, write=False, short=True), threading.get_ident()

    worked, asked = await asyncio.to_thread(lambda: asyncio.run(elsewhere()))
    assert worked not in (asked, threading.get_ident())


async def test_a_database_in_memory_is_one() -> None:
    made = database_of(open_engine("sqlite:///:memory:"))
    try:
        await made.run(add, write=True, short=True)
        await made.run(add, write=True, short=False)
        assert await counted(made) == 2
    finally:
        made.close()
