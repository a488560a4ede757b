"""Opens the store's database: connections, transactions, schema version."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy import event
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError

from sandbox_pipeline.errors import ConfigError, StoreError

VERSION_TABLE = "sandbox_pipeline_schema"
HEAD_REVISION = "0002"
MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_SECONDS = 30.0
HOLDS_OWN_TRANSACTIONS = "holds_own_transactions"
"""Option of a connection to SQLite that begins and commits by itself."""


def open_engine(url: str) -> Engine:
    """Connect and bring the schema up to date.

    Args:
        url: any SQLAlchemy URL. SQLite is put in WAL mode and made to wait up to
            `BUSY_SECONDS` for another process's write.

    Raises:
        ConfigError: the URL is not one, or its driver isn't installed.
        StoreError: the database can't be opened, or was written by a newer version.
    """
    try:
        parsed = sa.make_url(url)
        is_sqlite = parsed.get_backend_name() == "sqlite"
        engine = _sqlite_engine(parsed) if is_sqlite else _engine(parsed)
    except OSError as error:
        msg = f"state store {url}: {error.strerror}; check that the folder exists and is writable"
        raise StoreError(msg) from error
    except (ArgumentError, NoSuchModuleError, ModuleNotFoundError) as error:
        shown = url.rsplit("@", maxsplit=1)[-1]
        msg = f"SANDBOX_PIPELINE_DB_URL: cannot use {shown!r}: {error}"
        raise ConfigError(msg) from None
    try:
        _migrate(engine)
    except (DBAPIError, OSError) as error:
        raise store_error(engine, error) from error
    return engine


def is_in_memory(url: sa.URL) -> bool:
    """Whether it is a SQLite database that ends with its connection."""
    return url.database in (None, "", ":memory:")


def store_error(engine: Engine, error: Exception) -> StoreError:
    """The error for people; never shows the URL's password."""
    where = engine.url.render_as_string(hide_password=True)
    reason = str(error.orig) if isinstance(error, DBAPIError) else str(error)
    hint = ""
    if "locked" in reason:
        hint = f"; another process held it for more than {BUSY_SECONDS:g} s"
    elif "readonly" in reason or "unable to open" in reason:
        hint = "; check that the folder exists and is writable"
    elif "full" in reason:
        hint = "; free some disk space"
    return StoreError(f"state store {where}: {reason}{hint}")


def _engine(url: sa.URL) -> Engine:
    return sa.create_engine(url, pool_pre_ping=True, pool_size=8, max_overflow=8)


def _sqlite_engine(url: sa.URL) -> Engine:
    if url.database and not is_in_memory(url):
        Path(url.database).parent.mkdir(parents=True, exist_ok=True)
    engine = sa.create_engine(
        url,
        # :memory: would be a different database in each connection.
        poolclass=sa.StaticPool if is_in_memory(url) else sa.NullPool,
        connect_args={"timeout": BUSY_SECONDS, "check_same_thread": False},
    )

    def on_connect(connection: sqlite3.Connection, _record: Any) -> None:
        # The driver's implicit BEGIN comes too late for compare-and-set; on_begin does it.
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")
        # Survives the death of any process; a power cut may lose the last moments, and
        # takes the local sandboxes along.
        connection.execute("PRAGMA synchronous=NORMAL")

    def on_begin(connection: Connection) -> None:
        if not connection.get_execution_options().get(HOLDS_OWN_TRANSACTIONS):
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    event.listen(engine, "connect", on_connect)
    event.listen(engine, "begin", on_begin)
    return engine


def _migrate(engine: Engine) -> None:
    with engine.connect() as connection:
        if _revision(connection) == HEAD_REVISION:
            return
    # Alembic takes 0.15 s to import: only when there is something to do.
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            connection.exec_driver_sql("SELECT pg_advisory_xact_lock(727274)")
        if _revision(connection) == HEAD_REVISION:
            return
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            msg = (
                f"state store {engine.url.render_as_string(hide_password=True)}: its schema is not "
                f"one that this version knows ({error}); upgrade sandbox-pipeline"
            )
            raise StoreError(msg) from error


def _revision(connection: Connection) -> str | None:
    if not sa.inspect(connection).has_table(VERSION_TABLE):
        return None
    return connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 - a constant
