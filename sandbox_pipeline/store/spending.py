"""What forks may spend and have spent: reservations that no two processes can both be given."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from sandbox_pipeline.errors import BudgetError
from sandbox_pipeline.store import tables

LEAST_USD = 1e-6


@dataclass(frozen=True)
class Claim:
    """What a fork wants before it starts.

    Attributes:
        wanted_usd: the fork's own limit; None: an equal share of what is left for the forks of
            its orchestration that have nothing reserved yet.
        budget_usd: of the orchestration.
        daily_budget_usd: of one day (UTC) over everything in the store.
        limited_by: the field that `wanted_usd` comes from, for the message.
    """

    workflow_id: str
    fork_num: int
    num_forks: int
    wanted_usd: float | None
    budget_usd: float | None
    daily_budget_usd: float | None
    limited_by: str = "agent.max_budget_usd"


def reserve(connection: Connection, claim: Claim, at: float) -> float | None:
    """What the fork may spend; None while it has to wait for forks at work to end.

    Raises:
        BudgetError: too little is left, and nothing at work could give any back.
    """
    table = tables.spending
    day = day_of(at)
    of_workflow = connection.execute(
        sa.select(table).where(table.c.workflow_id == claim.workflow_id)
    ).all()
    mine = [row for row in of_workflow if row.fork_num == claim.fork_num]
    if mine and mine[0].reserved_usd is not None:
        return float(mine[0].reserved_usd)
    unplaced = max(1, claim.num_forks - len(of_workflow) + len(mine))
    amounts: list[float] = []
    for name, budget, counted in (
        ("budget_usd", claim.budget_usd, table.c.workflow_id == claim.workflow_id),
        ("daily_budget_usd", claim.daily_budget_usd, table.c.day == day),
    ):
        if budget is None:
            continue
        committed_usd, at_work = _committed(connection, counted)
        left = budget - committed_usd
        least = LEAST_USD if claim.wanted_usd is None else claim.wanted_usd - LEAST_USD
        if left < least:
            if at_work:
                return None
            msg = f"{name}: {max(0.0, left):.4f} of {budget:g} US dollars are left, which is " + (
                "nothing to start with"
                if claim.wanted_usd is None
                else f"less than {claim.limited_by} ({claim.wanted_usd:g})"
            )
            raise BudgetError(msg)
        amounts.append(left / unplaced)
    amount = min(amounts) if claim.wanted_usd is None else claim.wanted_usd
    _write(connection, claim.workflow_id, claim.fork_num, day=day, reserved_usd=amount)
    return amount


def settle(
    connection: Connection,
    workflow_id: str,
    fork_num: int,
    at: float,
    *,
    spent_usd: float | None,
    agent_ran: bool,
) -> None:
    """Give back what a fork that ended didn't spend.

    Where its cost is unknown though its agent ran, it counts as what was reserved.
    """
    table = tables.spending
    mine = connection.execute(
        sa.select(table).where(table.c.workflow_id == workflow_id, table.c.fork_num == fork_num)
    ).first()
    if spent_usd is None:
        if mine is None or mine.reserved_usd is None:
            return
        spent_usd = float(mine.reserved_usd) if agent_ran else 0.0
    day = day_of(at) if mine is None else mine.day
    _write(connection, workflow_id, fork_num, day=day, reserved_usd=None, spent_usd=spent_usd)


def day_of(at: float) -> str:
    """The UTC day of a wall time, such as `2026-11-23`."""
    return datetime.fromtimestamp(at, UTC).date().isoformat()


def _committed(connection: Connection, counted: sa.ColumnElement[bool]) -> tuple[float, int]:
    """What is reserved or spent, and how many have a reservation.

    Added up by the database: a day may have many thousands of forks.
    """
    table = tables.spending
    more = sa.case(
        (sa.func.coalesce(table.c.reserved_usd, 0.0) > table.c.spent_usd, table.c.reserved_usd),
        else_=table.c.spent_usd,
    )
    query = sa.select(
        sa.func.coalesce(sa.func.sum(more), 0.0), sa.func.count(table.c.reserved_usd)
    ).where(counted)
    committed_usd, at_work = connection.execute(query).one()
    return float(committed_usd), int(at_work)


def _write(connection: Connection, workflow_id: str, fork_num: int, **values: Any) -> None:
    table = tables.spending
    where = (table.c.workflow_id == workflow_id, table.c.fork_num == fork_num)
    if connection.execute(table.update().where(*where).values(**values)).rowcount == 0:
        fields = {"workflow_id": workflow_id, "fork_num": fork_num, "spent_usd": 0.0, **values}
        connection.execute(table.insert().values(**fields))
