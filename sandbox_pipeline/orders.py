"""What a fork at work has to obey: a cancel of it alone, a budget, the loss of its orchestration.

Orders come through the store, so that they can be given on any machine that reaches it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sandbox_pipeline.budgets import limit_usd, spent_usd
from sandbox_pipeline.errors import OwnershipError, PipelineError, ProviderError, StoreError
from sandbox_pipeline.ownership import held_by, left_by_its_run
from sandbox_pipeline.records import (
    AgentResult,
    Control,
    Fork,
    ForkRef,
    Orchestration,
    Outcome,
    Usage,
    Verdict,
    orchestration_key,
)
from sandbox_pipeline.store import Store

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
LAST_WORDS_SECONDS = 8.0
"""For an interrupted agent to say what it cost; longer than it may live on."""

T = TypeVar("T")


@dataclass(frozen=True)
class Stop:
    """That a fork has to end now.

    Attributes:
        outcome: what it ends as.
        message: why, for people.
    """

    outcome: Outcome
    message: str


class StoppedError(PipelineError):
    """The work of a stage was broken off by an order."""

    def __init__(self, stop: Stop) -> None:
        super().__init__(stop.message)
        self.stop = stop


GetOrder = Callable[[], Awaitable[Stop | None]]


class Orders:
    """Reads the orders of an orchestration, once for all its forks in this process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._lock = asyncio.Lock()
        self._read: dict[str, tuple[float, Orchestration, list[Fork]]] = {}

    async def of(self, ref: ForkRef, run_id: str) -> Stop | None:
        """Why this fork has to stop, if it has to.

        Raises:
            OwnershipError: the run lost the orchestration, or is dead; nothing may be touched.
            StoreError: nobody knows.
        """
        async with self._lock:
            known = self._read.get(ref.workflow_id)
            if known is None or time.monotonic() - known[0] > POLL_SECONDS / 2:
                key = orchestration_key(ref.workflow_id)
                orchestration = await self._store.need(Orchestration, key)
                forks = await self._store.forks(ref.workflow_id)
                known = (time.monotonic(), orchestration, forks)
                self._read[ref.workflow_id] = known
        _, orchestration, forks = known
        held_by(run_id)(orchestration)
        if left_by_its_run(orchestration):
            # Else it would keep a Celery worker from the run that takes over.
            msg = f"the worker of run {run_id} is dead; what this op does is left to the next run"
            raise OwnershipError(msg)
        return why_stop(orchestration, forks, ref.fork_num)


def why_stop(orchestration: Orchestration, forks: Sequence[Fork], fork_num: int) -> Stop | None:
    """What the records say; costs are those that the agents reported last."""
    fork = forks[fork_num]
    if Control.CANCEL in (fork.control, orchestration.control):
        return Stop(Outcome.CANCELLED, "cancelled by command")
    enough = orchestration.config.stop_after_verified
    if enough is not None and not _is_verified(fork):
        verified = sum(_is_verified(each) for each in forks)
        if verified >= enough:
            message = f"no longer needed: {verified} verified (stop_after_verified: {enough})"
            return Stop(Outcome.CANCELLED, message)
    budget = orchestration.config.budget_usd
    if budget is not None and sum(spent_usd(each) or 0.0 for each in forks) >= budget:
        message = f"the orchestration used up budget_usd ({budget:g} US dollars)"
        return Stop(Outcome.BUDGET_EXCEEDED, message)
    limit = limit_usd(orchestration, fork)
    if limit is not None and (fork.cost_so_far_usd or 0.0) >= limit:
        message = f"the fork used up its budget of {limit:g} US dollars"
        return Stop(Outcome.BUDGET_EXCEEDED, message)
    return None


def _is_verified(fork: Fork) -> bool:
    return fork.verification is not None and fork.verification.outcome is Verdict.VERIFIED


async def obeying(work: Awaitable[T], order: GetOrder) -> T:
    """Do the work unless an order says to stop; it is then broken off as by a cancel.

    Raises:
        StoppedError: with the order.
        OwnershipError: the run lost the orchestration.
    """
    task = asyncio.ensure_future(work)
    try:
        stop = await _first_order(task, order)
        if stop is not None:
            raise StoppedError(stop)
        return task.result()
    finally:
        await _break_off(task)


async def run_obeying(
    work: Awaitable[AgentResult],
    order: GetOrder,
    interrupt: Callable[[], Awaitable[bool]],
    record: Callable[[], Awaitable[Fork]],
) -> AgentResult:
    """Follow an agent to its end, and stop it when an order says so.

    Args:
        work: runs the agent.
        order: asked for every `POLL_SECONDS`.
        interrupt: stops the agent inside the sandbox, if it is one that runs there.
        record: the fork's, for what is known of an agent that says nothing more.

    Raises:
        OwnershipError: the run lost the orchestration; the agent is left to the other run.
    """
    task = asyncio.ensure_future(work)
    try:
        stop = await _first_order(task, order)
        if stop is None:
            return task.result()
        try:
            stopping = await interrupt()
        except ProviderError as error:
            logger.warning("the agent could not be interrupted: %s", error)
            stopping = False
        if stopping:
            await asyncio.wait({task}, timeout=LAST_WORDS_SECONDS)
        if task.done() and task.exception() is None:
            said = task.result()
            if said.outcome is Outcome.SUCCESS and stop.outcome is Outcome.BUDGET_EXCEEDED:
                return said
        else:
            cost = (await record()).cost_so_far_usd
            basis = "unknown" if cost is None else "computed"
            said = AgentResult(outcome=stop.outcome, usage=Usage(cost_usd=cost), cost_basis=basis)
        changes = {"outcome": stop.outcome, "failure_class": None, "message": stop.message}
        return said.model_copy(update=changes)
    finally:
        await _break_off(task)


async def _first_order(task: asyncio.Future[T], order: GetOrder) -> Stop | None:
    while not task.done():
        await asyncio.wait({task}, timeout=POLL_SECONDS)
        if task.done():
            break
        try:
            stop = await order()
        except StoreError as error:
            logger.warning("orders can't be read: %s", error)
            continue
        if stop is not None:
            return stop
    return None


async def _break_off(task: asyncio.Future[T]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # looked at, so that nobody complains of it
