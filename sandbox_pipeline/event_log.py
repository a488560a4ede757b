"""Dagster's SQLite event log, with its connections kept and its commits grouped.

Dagster makes a new SQLAlchemy engine for every event, and a commit, which cost more than the event.
This one keeps one engine for each database file of this process, and writes the same rows to the
same files, in the same order: those of steps and logs `COMMIT_SECONDS` later at most, in one commit
by a thread of its own, those of runs and assets at once, after all that came before. Whoever reads
by this process sees all. A killed process loses what it logged last; what happened to its forks is
in the pipeline's own store.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import sqlite3
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._config.config_schema import UserConfigSchema
from dagster._core.events import (
    ASSET_CHECK_EVENTS,
    ASSET_EVENTS,
    EVENT_TYPE_TO_PIPELINE_RUN_STATUS,
)
from dagster._core.storage.event_log.schema import SqlEventLogStorageTable
from dagster._core.storage.event_log.sqlite.sqlite_event_log import (
    INDEX_SHARD_NAME,
    SqliteEventLogStorage,
)
from dagster._core.storage.sql import create_engine
from dagster._core.storage.sqlite import SQLITE_BUSY_TIMEOUT_SECONDS
from dagster._serdes import ConfigurableClassData
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.pool import StaticPool

MAX_ENGINES = 16
COMMIT_SECONDS = 0.05
MAX_PENDING = 500
IDLE_SECONDS = 5.0
# Dagster's own method also writes these to the index of all runs.
INDEXED = frozenset({*ASSET_EVENTS, *ASSET_CHECK_EVENTS, *EVENT_TYPE_TO_PIPELINE_RUN_STATUS})
INSERT = SqlEventLogStorageTable.insert().inline()


class PooledSqliteEventLogStorage(SqliteEventLogStorage):
    """`SqliteEventLogStorage` with one engine for each shard.

    Config:
        base_dir: folder of the files; where Dagster's own would put them if left out.
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        # Before the base's constructor, which connects.
        self._engines: OrderedDict[str, Engine] = OrderedDict()
        self._pending: list[dg.EventLogEntry] = []
        self._pending_lock = threading.Lock()
        self._flush_lock = threading.Lock()
        self._wake = threading.Event()
        self._writer: threading.Thread | None = None
        self._failure: Exception | None = None
        super().__init__(base_dir, inst_data)

    @classmethod
    def config_type(cls) -> UserConfigSchema:
        """See Dagster's `ConfigurableClass.config_type`."""
        return {"base_dir": dg.Field(dg.StringSource, is_required=False)}

    @classmethod
    def from_config_value(
        cls, inst_data: ConfigurableClassData | None, config_value: Any
    ) -> PooledSqliteEventLogStorage:
        """See Dagster's `ConfigurableClass.from_config_value`."""
        home = Path(os.environ.get("DAGSTER_HOME", "."))
        return cls(config_value.get("base_dir") or str(home / "history" / "runs"), inst_data)

    @contextmanager
    def _connect(self, shard: str) -> Generator[Connection]:
        # One connection at a time, as in the base, whose lock this is.
        with self._db_lock:
            engine = self._engine(shard)
            if shard not in self._initialized_dbs:
                self._initdb(engine, for_index_shard=shard == INDEX_SHARD_NAME)
                self._initialized_dbs.add(shard)
            with engine.connect() as connection, connection.begin():
                yield connection

    def _engine(self, shard: str) -> Engine:
        if shard in self._engines:
            self._engines.move_to_end(shard)
            return self._engines[shard]
        engine = create_engine(
            self.conn_string_for_shard(shard),
            poolclass=StaticPool,
            connect_args={
                "timeout": SQLITE_BUSY_TIMEOUT_SECONDS,
                "check_same_thread": False,
            },
        )
        event.listen(engine, "connect", _no_sync_for_each_commit)
        self._engines[shard] = engine
        if len(self._engines) > MAX_ENGINES:
            self._engines.popitem(last=False)[1].dispose()
        return engine

    def run_connection(self, run_id: str | None = None) -> Any:
        """See Dagster's `SqlEventLogStorage.run_connection`."""
        self.flush()
        return super().run_connection(run_id)

    def store_event(self, event: dg.EventLogEntry) -> None:
        """See Dagster's `EventLogStorage.store_event`.

        Raises:
            DBAPIError: this event, or one before it, can't be written; those are tried again.
        """
        if event.dagster_event_type in INDEXED:
            super().store_event(event)
            return
        with self._pending_lock:
            self._pending.append(event)
            if self._writer is None or not self._writer.is_alive():
                _open.add(self)
                self._writer = threading.Thread(target=self._write, name="event-log", daemon=True)
                self._writer.start()
        if self._failure is not None or len(self._pending) > MAX_PENDING:
            self.flush()
        else:
            self._wake.set()

    def flush(self) -> None:
        """Write what is pending.

        Raises:
            DBAPIError: it can't be written, and is pending still.
        """
        # Also where nothing is pending: somebody else may be about to write what was.
        with self._flush_lock:
            with self._pending_lock:
                events, self._pending = self._pending, []
            written = 0
            try:
                for run_id, group in itertools.groupby(events, lambda event: event.run_id):
                    # One statement for all events, which SQLAlchemy compiles once.
                    rows = [self._event_to_row(event) for event in group]
                    with self._connect(run_id) as connection:
                        connection.execute(INSERT, rows)
                    written += len(rows)
            except Exception as error:
                with self._pending_lock:
                    self._pending[:0] = events[written:]
                self._failure = error
                raise
            self._failure = None

    def _write(self) -> None:
        while True:
            if not self._wake.wait(IDLE_SECONDS):
                with self._pending_lock:
                    if not self._pending:
                        self._writer = None
                        return
            time.sleep(COMMIT_SECONDS)
            self._wake.clear()
            # Whoever stores the next event, or reads, is told.
            with contextlib.suppress(Exception):
                self.flush()

    def dispose(self) -> None:
        """Write what is pending and close the connections."""
        self.flush()
        for engine in self._engines.values():
            engine.dispose()
        self._engines.clear()
        super().dispose()


_open: weakref.WeakSet[PooledSqliteEventLogStorage] = weakref.WeakSet()


@atexit.register
def _flush_all() -> None:
    """Not everybody disposes of an instance."""
    for storage in list(_open):
        storage.flush()


def _no_sync_for_each_commit(connection: sqlite3.Connection, _record: Any) -> None:
    # Still survives the death of any process; a power cut may lose the last moments. Waiting for
    # the disk at each commit was half of an event's time.
    connection.execute("PRAGMA synchronous=NORMAL")
