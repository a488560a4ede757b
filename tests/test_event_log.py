"""Dagster's event log with grouped commits: the order, and what may never be missing from it."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster._core.events import DagsterEventType
from sqlalchemy.exc import DBAPIError

from sandbox_pipeline.event_log import MAX_PENDING, PooledSqliteEventLogStorage

RUN = "run-1"


def entry(
    text: str, *, run_id: str = RUN, event: dg.DagsterEvent | None = None
) -> dg.EventLogEntry:
    return dg.EventLogEntry(
        error_info=None,
        level=10,
        user_message=text,
        run_id=run_id,
        timestamp=time.time(),
        dagster_event=event,
    )


@pytest.fixture
def storage(tmp_path: Path) -> Iterator[PooledSqliteEventLogStorage]:
    storage = PooledSqliteEventLogStorage(str(tmp_path / "runs"))
    yield storage
    storage.dispose()


def read(storage: PooledSqliteEventLogStorage, run_id: str = RUN) -> list[str]:
    return [record.user_message for record in storage.get_logs_for_run(run_id)]


def read_file(folder: Path, run_id: str = RUN) -> list[tuple[int, str]]:
    """As another process sees it."""
    with sqlite3.connect(f"file:{folder}/{run_id}.db?mode=ro", uri=True) as connection:
        return connection.execute("SELECT id, event FROM event_logs ORDER BY id").fetchall()


def test_who_reads_sees_all_in_order(storage: PooledSqliteEventLogStorage) -> None:
    wanted = [str(number) for number in range(3 * MAX_PENDING + 7)]
    for text in wanted:
        storage.store_event(entry(text))
    assert read(storage) == wanted


def test_runs_that_take_turns_keep_their_own_order(storage: PooledSqliteEventLogStorage) -> None:
    for number in range(20):
        storage.store_event(entry(str(number), run_id=f"run-{number % 3}"))
    for place in range(3):
        assert read(storage, f"run-{place}") == [str(n) for n in range(20) if n % 3 == place]


def test_an_event_of_the_run_comes_after_all_before_it_and_is_there_at_once(
    storage: PooledSqliteEventLogStorage, tmp_path: Path
) -> None:
    for number in range(5):
        storage.store_event(entry(str(number)))
    end = dg.DagsterEvent(DagsterEventType.RUN_SUCCESS.value, job_name="j")
    storage.store_event(entry("end", event=end))
    rows = read_file(tmp_path / "runs")
    assert len(rows) == 6
    assert '"end"' in rows[-1][1]


def test_others_see_an_event_without_anybody_asking(
    storage: PooledSqliteEventLogStorage, tmp_path: Path
) -> None:
    storage.store_event(entry("first"))
    assert read(storage) == ["first"]
    storage.store_event(entry("second"))
    end = time.monotonic() + 10
    while len(read_file(tmp_path / "runs")) < 2:
        assert time.monotonic() < end, "the writer wrote nothing"
        time.sleep(0.01)


class Slow(PooledSqliteEventLogStorage):
    """Takes its time between taking an event and writing it."""

    def _event_to_row(self, event: dg.EventLogEntry) -> dict[str, Any]:
        time.sleep(0.3)
        return super()._event_to_row(event)


@pytest.mark.parametrize("is_read", [True, False])
def test_what_the_writer_has_taken_comes_first(tmp_path: Path, *, is_read: bool) -> None:
    storage = Slow(str(tmp_path / "runs"))
    storage.store_event(entry("first"))
    while storage._pending:
        time.sleep(0.005)
    if not is_read:
        end = dg.DagsterEvent(DagsterEventType.RUN_SUCCESS.value, job_name="j")
        storage.store_event(entry("end", event=end))
    assert read(storage)[0] == "first"
    storage.dispose()


def test_what_cannot_be_written_is_told_and_kept(
    storage: PooledSqliteEventLogStorage, tmp_path: Path
) -> None:
    storage.store_event(entry("0"))
    assert read(storage) == ["0"]
    database = tmp_path / "runs" / f"{RUN}.db"
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE event_logs RENAME TO away")
    storage.store_event(entry("1"))
    with pytest.raises(DBAPIError):
        storage.flush()
    with pytest.raises(DBAPIError):
        storage.store_event(entry("2"))
    with sqlite3.connect(database) as connection:
        connection.execute("ALTER TABLE away RENAME TO event_logs")
    storage.store_event(entry("3"))
    assert read(storage) == ["0", "1", "2", "3"]


@pytest.mark.parametrize("end", ["storage.dispose()", "pass"])
def test_the_end_of_the_process_loses_nothing(tmp_path: Path, end: str) -> None:
    program = f"""
        from sandbox_pipeline.event_log import PooledSqliteEventLogStorage
        from tests.test_event_log import entry
        storage = PooledSqliteEventLogStorage({str(tmp_path / "runs")!r})
        for number in range(10):
            storage.store_event(entry(str(number)))
        {end}
    """
    root = Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, check=True)
    assert len(read_file(tmp_path / "runs")) == 10
