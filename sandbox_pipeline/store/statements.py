"""Records and events in the tables: what the store's transactions are made of."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection
from sqlalchemy.exc import IntegrityError

from sandbox_pipeline.errors import ConflictError, PipelineError
from sandbox_pipeline.records import (
    Event,
    Fork,
    Lease,
    Orchestration,
    Record,
    SandboxState,
    orchestration_key,
)
from sandbox_pipeline.store import tables

R = TypeVar("R", bound=Record)

MAX_PAYLOAD_CHARS = 4000
Fence = Callable[[Orchestration | None], None]
"""Raises where the orchestration is no longer in the hands that a write needs it in."""
# Made once: to put a statement together and to find its compiled form takes longer than to run it.
RECORD = sa.select(tables.state.c.value, tables.state.c.version).where(
    tables.state.c.key == sa.bindparam("key"), tables.state.c.kind == sa.bindparam("kind")
)
LOCKED_RECORD = RECORD.with_for_update()
# Shared: many forks write at once, and a change of the owner waits for all of them.
OWNING_RECORD = RECORD.with_for_update(read=True)
TWO_RECORDS = sa.select(tables.state.c.key, tables.state.c.value, tables.state.c.version).where(
    sa.or_(*(tables.state.c.key == sa.bindparam(name) for name in ("fork", "orchestration")))
)
CHANGED_RECORD = (
    tables.state.update()
    .where(
        tables.state.c.key.in_([sa.bindparam("key"), sa.bindparam("intent_key")]),
        tables.state.c.version == sa.bindparam("old_version"),
    )
    .values({column: sa.bindparam(f"new_{column.name}") for column in tables.state.c})
)
# Not as one list, which is put into the statement anew at each call.
_LIVE = [sa.literal(state.value) for state in SandboxState if state is not SandboxState.GONE]
LIVE_LEASE = (tables.state.c.kind == Lease.kind, tables.state.c.status.in_(_LIVE))
LIVE_LEASES = sa.select(tables.state.c.value, tables.state.c.version).where(*LIVE_LEASE)
LIVE_LEASES_OF = LIVE_LEASES.where(tables.state.c.workflow_id == sa.bindparam("workflow_id"))
OPEN = "open"
COMPLETE = "complete"
SNAPSHOT_LEFT = "complete, a snapshot left"


class TerminalError(PipelineError):
    """A write would have changed the outcome of a fork that is already final."""


def check_fence(connection: Connection, workflow_id: str, fence: Fence | None) -> None:
    """Let the fence see whose the orchestration is, which then can't change before the commit."""
    if fence is None:
        return
    row = connection.execute(
        OWNING_RECORD, {"key": orchestration_key(workflow_id), "kind": Orchestration.kind}
    ).first()
    fence(None if row is None else load(Orchestration, row.value, row.version))


def live_leases(connection: Connection, workflow_id: str | None) -> list[Lease]:
    """Those not known to be gone, of one orchestration or all."""
    if workflow_id is None:
        rows = connection.execute(LIVE_LEASES)
    else:
        rows = connection.execute(LIVE_LEASES_OF, {"workflow_id": workflow_id})
    return [load(Lease, value, version) for value, version in rows]


def get_record(
    connection: Connection, record_type: type[R], key: str, *, lock: bool = False
) -> R | None:
    """The record under a state key; `lock`: nobody else changes it before the commit."""
    query = LOCKED_RECORD if lock else RECORD
    row = connection.execute(query, {"key": key, "kind": record_type.kind}).first()
    return None if row is None else load(record_type, row.value, row.version)


def load(record_type: type[R], value: str, version: int) -> R:
    """A record as it is in the column `value`."""
    return cast("R", _parsed(record_type, value, version))


# Records are immutable, and most reads find what an earlier one found.
@functools.lru_cache(maxsize=2048)
def _parsed(record_type: type[Record], value: str, version: int) -> Record:
    return record_type.model_validate_json(value).model_copy(update={"version": version})


def put_record(connection: Connection, record: R, current: Record | None = None) -> R:
    """Store a record with its next version, if what is stored has its own.

    Args:
        connection: in a transaction.
        record: what is to be stored.
        current: what the same transaction found stored, where it has looked.

    Raises:
        ConflictError: another version is stored.
        TerminalError: it would change a fork's final outcome.
    """
    if isinstance(record, Fork):
        found = get_record(connection, Fork, record.key) if current is None else current
        if isinstance(found, Fork):
            _guard_outcome(found, record)
    version = record.version + 1
    row = row_of(record, version)
    if record.version == 0:
        try:
            connection.execute(tables.state.insert(), row)
        except IntegrityError as error:
            msg = f"{record.key} exists already"
            raise ConflictError(msg) from error
    else:
        named = {f"new_{name}": value for name, value in row.items()}
        named["key"] = record.key
        named["intent_key"] = record.intent_key if isinstance(record, Lease) else record.key
        named["old_version"] = record.version
        result = connection.execute(CHANGED_RECORD, named)
        if result.rowcount != 1:
            msg = f"{record.key} was changed by somebody else"
            raise ConflictError(msg)
    return record.evolve(version=version)


def _guard_outcome(stored: Fork, fork: Fork) -> None:
    if stored.outcome.is_terminal and stored.outcome != fork.outcome:
        msg = f"{fork.key} ended as {stored.outcome}; it can't become {fork.outcome}"
        raise TerminalError(msg)


def row_of(record: Record, version: int) -> dict[str, Any]:
    """A record as a row."""
    status = ""
    fork_num = None
    if isinstance(record, Fork):
        status, fork_num = record.outcome.value, record.fork_num
    elif isinstance(record, Lease):
        status, fork_num = record.state.value, record.fork_num
    elif isinstance(record, Orchestration):
        left = record.base_snapshot is not None or record.stale_snapshots
        status = (SNAPSHOT_LEFT if left else COMPLETE) if record.complete else OPEN
    return {
        "key": record.key,
        "kind": record.kind,
        "workflow_id": record.workflow_id,
        "fork_num": fork_num,
        "status": status,
        "version": version,
        "value": record.model_dump_json(exclude={"version"}),
    }


def append_events(connection: Connection, new: Sequence[Event]) -> None:
    """Add events to the timeline, with long texts cut."""
    if not new:
        return
    connection.execute(
        tables.events.insert(),
        [
            {
                "workflow_id": event.workflow_id,
                "fork_num": event.fork_num,
                "name": event.name,
                "time": event.time,
                "payload": json.dumps(_bounded(event.payload), default=str),
            }
            for event in new
        ],
    )


def _bounded(payload: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: f"{value[:MAX_PAYLOAD_CHARS]}…"
        if isinstance(value, str) and len(value) > MAX_PAYLOAD_CHARS
        else value
        for name, value in payload.items()
    }
