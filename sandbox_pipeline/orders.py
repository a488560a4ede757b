"""What a fork at work has to obey: a cancel of it alone, a budget, the loss of its orchestration.

Orders come through the store, so that they can be given on any machine that reaches it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Generator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

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


Judge = Callable[[int], Stop | None]
"""Why the fork of this number has to stop, if it has to."""


def all_orders(_stop: Stop) -> bool:
    """For a fork that obeys whatever it is told."""
    return True


class Orders:
    """Reads the orders of an orchestration, once for all its forks in this process."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._watchers: dict[tuple[str, str], list[Watcher]] = {}
        self._readers: dict[tuple[str, str], asyncio.Task[None]] = {}

    async def of(self, ref: ForkRef, run_id: str) -> Stop | None:
        """Why this fork has to stop, if it has to.

        Raises:
            OwnershipError: the run lost the orchestration, or is dead; nothing may be touched.
            StoreError: nobody knows.
        """
        return (await self._judge(ref.workflow_id, run_id))(ref.fork_num)

    @contextlib.contextmanager
    def watch(
        self, ref: ForkRef, run_id: str, obeys: Callable[[Stop], bool] = all_orders
    ) -> Generator[Watcher]:
        """Read orders twice a second; gives who waits for the first that the fork has to obey.

        Args:
            ref: the fork.
            run_id: the run that works on it.
            obeys: whether the fork has to obey an order; others are passed over.
        """
        key = (ref.workflow_id, run_id)
        ordered: asyncio.Future[Stop] = asyncio.get_running_loop().create_future()
        made = Watcher(ref.fork_num, obeys, ordered, partial(self._cancel_of, ref, run_id))
        self._watchers.setdefault(key, []).append(made)
        if key not in self._readers:
            self._readers[key] = asyncio.create_task(self._read(*key))
        try:
            yield made
        finally:
            self._watchers[key].remove(made)
            if not made.ordered.cancel():
                made.ordered.exception()  # looked at, so that nobody complains of it

    async def _read(self, workflow_id: str, run_id: str) -> None:
        """Read orders as long as somebody watches."""
        key = (workflow_id, run_id)
        try:
            while self._watchers[key]:
                await asyncio.sleep(POLL_SECONDS)
                await self._tell(workflow_id, run_id)
        finally:
            del self._readers[key]
            if not self._watchers[key]:
                del self._watchers[key]

    async def _tell(self, workflow_id: str, run_id: str) -> None:
        watchers = self._watchers[workflow_id, run_id]
        try:
            judge = await self._judge(workflow_id, run_id)
        except StoreError as error:
            logger.warning("orders can't be read: %s", error)
        except Exception as error:  # noqa: BLE001 (raised where it is waited for)
            for watcher in watchers:
                watcher.fail(error)
        else:
            for watcher in watchers:
                watcher.tell(judge)

    async def _cancel_of(self, ref: ForkRef, run_id: str) -> Stop | None:
        """As `of`, for cancels by command only, and cheap however many forks there are."""
        try:
            fork, orchestration = await self._store.fork(ref.workflow_id, ref.fork_num)
        except StoreError as error:
            logger.warning("orders can't be read: %s", error)
            return None
        held_by(run_id)(orchestration)
        return _cancel(orchestration, fork)

    async def _judge(self, workflow_id: str, run_id: str) -> Judge:
        orchestration = await self._store.need(Orchestration, orchestration_key(workflow_id))
        forks = await self._store.forks(workflow_id)
        held_by(run_id)(orchestration)
        if left_by_its_run(orchestration):
            # Else it would keep a Celery worker from the run that takes over.
            msg = f"the worker of run {run_id} is dead; what this op does is left to the next run"
            raise OwnershipError(msg)
        return judge_of(orchestration, forks)


@dataclass(frozen=True, eq=False)
class Watcher:
    """Waits for the first order that a fork has to obey."""

    fork_num: int
    obeys: Callable[[Stop], bool]
    ordered: asyncio.Future[Stop]
    cancelled: Callable[[], Awaitable[Stop | None]]

    async def first_before(self, work: asyncio.Future[Any]) -> Stop | None:
        """The order that comes before the work has ended, or a cancel that spoilt it.

        Raises:
            OwnershipError: the run lost the orchestration, or is dead; nothing may be touched.
        """
        await asyncio.wait({work, self.ordered}, return_when=asyncio.FIRST_COMPLETED)
        if self.ordered.done():
            return self.ordered.result()
        # Whoever cancels stops agents and ends sandboxes, which may be felt before it is read.
        return None if _went_well(work) else await self.cancelled()

    def tell(self, judge: Judge) -> None:
        """Heed what the records say."""
        if not self.ordered.done():
            stop = judge(self.fork_num)
            if stop is not None and self.obeys(stop):
                self.ordered.set_result(stop)

    def fail(self, error: Exception) -> None:
        """Raise this where the order is waited for."""
        if not self.ordered.done():
            self.ordered.set_exception(error)


Watch = AbstractContextManager[Watcher]


def judge_of(orchestration: Orchestration, forks: Sequence[Fork]) -> Judge:
    """Why which fork has to stop, as the records say; costs are those that agents reported last."""
    config = orchestration.config
    verified = sum(_is_verified(each) for each in forks)
    spent = sum(spent_usd(each) or 0.0 for each in forks)

    def judge(fork_num: int) -> Stop | None:
        fork = forks[fork_num]
        cancel = _cancel(orchestration, fork)
        if cancel is not None:
            return cancel
        enough = config.stop_after_verified
        if enough is not None and verified >= enough and not _is_verified(fork):
            message = f"no longer needed: {verified} verified (stop_after_verified: {enough})"
            return Stop(Outcome.CANCELLED, message)
        budget = config.budget_usd
        if budget is not None and spent >= budget:
            message = f"the orchestration used up budget_usd ({budget:g} US dollars)"
            return Stop(Outcome.BUDGET_EXCEEDED, message)
        limit = limit_usd(orchestration, fork)
        if limit is not None and (fork.cost_so_far_usd or 0.0) >= limit:
            message = f"the fork used up its budget of {limit:g} US dollars"
            return Stop(Outcome.BUDGET_EXCEEDED, message)
        return None

    return judge


def _cancel(orchestration: Orchestration, fork: Fork) -> Stop | None:
    if Control.CANCEL in (fork.control, orchestration.control):
        return Stop(Outcome.CANCELLED, "cancelled by command")
    return None


def _went_well(work: asyncio.Future[Any]) -> bool:
    if work.cancelled() or work.exception() is not None:
        return False
    result = work.result()
    return not isinstance(result, AgentResult) or result.outcome is Outcome.SUCCESS


def _is_verified(fork: Fork) -> bool:
    return fork.verification is not None and fork.verification.outcome is Verdict.VERIFIED


async def obeying(work: Awaitable[T], watch: Watch) -> T:
    """Do the work unless an order says to stop; it is then broken off as by a cancel.

    Raises:
        StoppedError: with the order.
        OwnershipError: the run lost the orchestration.
    """
    task = asyncio.ensure_future(work)
    try:
        with watch as watcher:
            stop = await watcher.first_before(task)
        if stop is not None:
            raise StoppedError(stop)
        return task.result()
    finally:
        await _break_off(task)


async def run_obeying(
    work: Awaitable[AgentResult],
    watch: Watch,
    interrupt: Callable[[], Awaitable[bool]],
    record: Callable[[], Awaitable[Fork]],
) -> AgentResult:
    """Follow an agent to its end, and stop it when an order says so.

    Args:
        work: runs the agent.
        watch: of the fork's orders.
        interrupt: stops the agent inside the sandbox, if it is one that runs there.
        record: the fork's, for what is known of an agent that says nothing more.

    Raises:
        OwnershipError: the run lost the orchestration; the agent is left to the other run.
    """
    task = asyncio.ensure_future(work)
    try:
        with watch as watcher:
            stop = await watcher.first_before(task)
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


async def _break_off(task: asyncio.Future[T]) -> None:
    if not task.done():
        task.cancel()
        await asyncio.wait({task})
    if not task.cancelled():
        task.exception()  # looked at, so that nobody complains of it
