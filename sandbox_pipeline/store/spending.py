"""What forks may spend and have spent: reservations that no two processes can both be given."""

from __future__ import annotations

from collections.abc import Sequence
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
    """

    workflow_id: str
    fork_num: int
    num_forks: int
    wanted_usd: float | None
    budget_usd: float | None
    daily_budget_usd: float | None


def reserve(connection: Connection, claim: Claim, at: float) -> float | None:
    """What the fork may spend; None while it has to wait for forks at work to end.

    Raises:
        BudgetError: too little is left, and nothing at work could give any back.
    """
    table = tables.spending
    day = day_of(at)
    rows = connection.execute(
        sa.select(table).where(sa.or_(table.c.workflow_id == claim.workflow_id, table.c.day == day))
    ).all()
    mine = [row for row in rows if _is_of(row, claim)]
    if mine and mine[0].reserved_usd is not None:
        return float(mine[0].reserved_usd)
    of_workflow = [row for row in rows if row.workflow_id == claim.workflow_id]
    of_day = [row for row in rows if row.day == day]
    unplaced = max(1, claim.num_forks - len(of_workflow) + len(mine))
    amounts: list[float] = []
    for name, budget, counted in (
        ("budget_usd", claim.budget_usd, of_workflow),
        ("daily_budget_usd", claim.daily_budget_usd, of_day),
    ):
        if budget is None:
            continue
        left = budget - _committed(counted)
        least = LEAST_USD if claim.wanted_usd is None else claim.wanted_usd - LEAST_USD
        if left < least:
            if any(row.reserved_usd is not None for row in counted):
                return None
            msg = f"{name}: {max(0.0, left):.4f} of {budget:g} US dollars are left, which is " + (
                "nothing to start with"
                if claim.wanted_usd is None
                else f"less than agent.max_budget_usd ({claim.wanted_usd:g})"
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


def _is_of(row: Any, claim: Claim) -> bool:
    return row.workflow_id == claim.workflow_id and row.fork_num == claim.fork_num


def _committed(rows: Sequence[Any]) -> float:
    return sum(max(row.reserved_usd or 0.0, row.spent_usd) for row in rows)


def _write(connection: Connection, workflow_id: str, fork_num: int, **values: Any) -> None:
    table = tables.spending
    where = (table.c.workflow_id == workflow_id, table.c.fork_num == fork_num)
    if connection.execute(table.update().where(*where).values(**values)).rowcount == 0:
        fields = {"workflow_id": workflow_id, "fork_num": fork_num, "spent_usd": 0.0, **values}
        connection.execute(table.insert().values(**fields))
