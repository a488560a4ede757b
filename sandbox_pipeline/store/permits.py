"""The rate limit of creations, over all processes that share a store."""

from __future__ import annotations

from typing import Any, cast

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sandbox_pipeline.store import tables

STALE_SECONDS = 120.0
"""After which a permit whose holder never said that it was answered no longer counts."""


def take(connection: Connection, scope: str, starts: int, window: float, at: float) -> int | float:
    """Permission for one creation, or how many seconds to wait before asking again.

    Args:
        connection: in a transaction that no other one of this scope runs beside.
        scope: what the limit is of.
        starts: most creations in any window.
        window: its length in seconds.
        at: the time, in seconds.
    """
    table = tables.permits
    connection.execute(
        table.delete().where(
            table.c.scope == scope,
            sa.or_(
                table.c.finished_at < at - window,
                table.c.started_at < at - window - STALE_SECONDS,
                table.c.started_at > at + window + STALE_SECONDS,
            ),
        )
    )
    counted = (
        connection.execute(sa.select(table.c.finished_at).where(table.c.scope == scope))
        .scalars()
        .all()
    )
    if len(counted) < starts:
        result = connection.execute(
            table.insert().values(scope=scope, started_at=at, finished_at=None)
        )
        return int(cast("Any", result.inserted_primary_key)[0])
    finished = [end for end in counted if end is not None]
    soonest = min(finished, default=at - window + 0.1) + window - at
    return max(0.005, min(soonest, window))


def finish(connection: Connection, permit: int, at: float) -> None:
    """Note when a creation was answered; the first word counts."""
    table = tables.permits
    connection.execute(
        table.update()
        .where(table.c.id == permit, table.c.finished_at.is_(None))
        .values(finished_at=at)
    )
