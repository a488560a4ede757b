"""Dagster's SQLite event log, with its connections kept.

Dagster makes a new SQLAlchemy engine for every event, which costs more than the event. This one
keeps one for each database file of this process; it writes the same rows to the same files.
"""

from __future__ import annotations

import os
import sqlite3
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

    def store_event(self, event: dg.EventLogEntry) -> None:
        """See Dagster's `EventLogStorage.store_event`.

        One statement for all events, which SQLAlchemy compiles once: half of the base's time.
        """
        if event.dagster_event_type in INDEXED:
            super().store_event(event)
            return
        with self.run_connection(event.run_id) as connection:
            connection.execute(INSERT, self._event_to_row(event))

    def dispose(self) -> None:
        """Close the connections."""
        for engine in self._engines.values():
            engine.dispose()
        self._engines.clear()
        super().dispose()


def _no_sync_for_each_commit(connection: sqlite3.Connection, _record: Any) -> None:
    # Still survives the death of any process; a power cut may lose the last moments. Waiting for
    # the disk at each commit was half of an event's time.
    connection.execute("PRAGMA synchronous=NORMAL")
