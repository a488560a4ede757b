"""Runs the store's transactions: short ones of SQLite at once, all others in a thread."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar, cast

from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import DBAPIError

from sandbox_pipeline.store.engine import (
    BUSY_SECONDS,
    HOLDS_OWN_TRANSACTIONS,
    is_in_memory,
    store_error,
)

T = TypeVar("T")
Work = Callable[[Connection], T]

SERVER_THREADS = 8
WRITES_AT_ONCE = 255
"""Then one is the thread's, whose connection moves SQLite's log into the file."""


class Database(Protocol):
    """Where transactions run. Safe to use from many coroutines."""

    async def run(self, work: Work[T], *, write: bool, short: bool) -> T:
        """What `work` gives, stored as a whole or not at all.

        Args:
            work: gets a connection in a transaction; must not wait for anything else.
            write: it may change something.
            short: it reads and writes a few rows only.

        Raises:
            StoreError: the database failed.
        """
        ...

    def close(self) -> None:
        """Let go of the connections, once what was begun is done."""
        ...


def database_of(engine: Engine) -> Database:
    """How transactions run in this engine's database."""
    is_sqlite = engine.dialect.name == "sqlite"
    return SqliteDatabase(engine) if is_sqlite else ServerDatabase(engine)


class ServerDatabase:
    """A database that is asked over a connection: always in a thread."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._threads = ThreadPoolExecutor(SERVER_THREADS, thread_name_prefix="store")

    async def run(self, work: Work[T], *, write: bool, short: bool) -> T:
        """See `Database.run`."""
        del write, short

        def call() -> T:
            try:
                with self._engine.begin() as connection:
                    return work(connection)
            except DBAPIError as error:
                raise store_error(self._engine, error) from error

        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    def close(self) -> None:
        """See `Database.close`."""
        self._threads.shutdown(wait=True)
        self._engine.dispose()


class SqliteDatabase:
    """A SQLite file.

    To hand a short transaction to a thread takes as long as the transaction itself, which waits
    for no disk: it runs at once, on the event loop. Where another process writes just then, it is
    the thread that waits; as it is for all that takes long.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="store")
        self._in_thread = _KeptConnection(engine, BUSY_SECONDS)
        # :memory: would be another database in a second connection.
        self._at_once = None if is_in_memory(engine.url) else _KeptConnection(engine, 0.0)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._writes = 0

    async def run(self, work: Work[T], *, write: bool, short: bool) -> T:
        """See `Database.run`."""
        loop = asyncio.get_running_loop()
        try:
            if short and self._at_once is not None and self._has_turn(loop, write=write):
                with contextlib.suppress(_BusyError):
                    return self._at_once.run(work, write=write)
            call = self._in_thread.run
            return await loop.run_in_executor(self._thread, lambda: call(work, write=write))
        except (DBAPIError, sqlite3.Error) as error:
            raise store_error(self._engine, error) from error

    def close(self) -> None:
        """See `Database.close`."""
        self._thread.shutdown(wait=True)
        if self._at_once is not None:
            self._at_once.close()
        self._in_thread.close()
        self._engine.dispose()

    def _has_turn(self, loop: asyncio.AbstractEventLoop, *, write: bool) -> bool:
        # The connection is of one loop only, so that no two threads ever use it.
        self._loop = self._loop or loop
        self._writes += write
        if self._writes > WRITES_AT_ONCE:
            self._writes = 0
            return False
        return loop is self._loop


class _BusyError(Exception):
    """Another process writes just now; nothing was done."""


class _KeptConnection:
    """A connection that is kept until something goes wrong; used by one thread at a time."""

    def __init__(self, engine: Engine, busy_seconds: float) -> None:
        self._engine = engine
        self._busy_seconds = busy_seconds
        self._connection: Connection | None = None

    def run(self, work: Work[T], *, write: bool) -> T:
        """What `work` gives, in a transaction.

        Raises:
            _BusyError: where this connection doesn't wait.
        """
        connection = self._connection or self._connect()
        # Of the driver, since SQLAlchemy's own take longer than what happens in them.
        driver = _driver_of(connection)
        try:
            driver.execute("BEGIN IMMEDIATE" if write else "BEGIN")
            done = work(connection)
            driver.execute("COMMIT")
        except BaseException as error:
            if self._busy_seconds == 0 and _is_busy(error):
                _roll_back(driver)
                raise _BusyError from error
            self.close()
            raise
        return done

    def close(self) -> None:
        """Give it up, and what was not committed."""
        if self._connection is not None:
            _roll_back(_driver_of(self._connection))
            self._connection.close()
            self._connection = None

    def _connect(self) -> Connection:
        made = self._engine.connect().execution_options(**{HOLDS_OWN_TRANSACTIONS: True})
        driver = _driver_of(made)
        driver.execute(f"PRAGMA busy_timeout={round(self._busy_seconds * 1000)}")
        if self._busy_seconds == 0:
            # It waits for the disk.
            driver.execute("PRAGMA wal_autocheckpoint=0")
        self._connection = made
        return made


def _driver_of(connection: Connection) -> sqlite3.Connection:
    return cast("sqlite3.Connection", connection.connection.driver_connection)


def _roll_back(driver: sqlite3.Connection) -> None:
    if driver.in_transaction:
        driver.execute("ROLLBACK")


def _is_busy(error: BaseException) -> bool:
    cause = error.orig if isinstance(error, DBAPIError) else error
    code = getattr(cause, "sqlite_errorcode", None) if isinstance(cause, sqlite3.Error) else None
    return code is not None and code & 0xFF == sqlite3.SQLITE_BUSY
