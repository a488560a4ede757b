"""How ops run: all on one event loop, with cancellation that works.

`dagster-async-executor` ignores a cancel until the running steps end, because nothing looks at
the interrupt that Dagster captured. Here each step is an asyncio task; an interrupt cancels them
all, waits until each has finished its own clean-up, and ends the run as Dagster's other executors
do.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Self, cast

import dagster as dg
from dagster._core.definitions.executor_definition import (
    _core_multiprocess_executor_creation,
    multiple_process_executor_requirements,
)
from dagster._core.definitions.scoped_resources_builder import Resources, ScopedResourcesBuilder
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.execution.retries import RetryMode
from dagster._core.execution.step_dependency_config import StepDependencyConfig
from dagster._core.executor.base import Executor
from dagster._utils.interrupts import check_captured_interrupt
from dagster_async_executor.execution.plan.execute_plan import (
    _trigger_hook,
    dagster_event_sequence_for_step,
)
from dagster_async_executor.execution.plan.execute_step import _verify_if_complete
from dagster_async_executor.executor import AsyncExecutor
from dagster_async_executor.executor_definition import async_executor

from sandbox_pipeline.defs.guard import guarded
from sandbox_pipeline.defs.plain_steps import is_plain, plain_step_events
from sandbox_pipeline.defs.ready_steps import IndexedPlan

if TYPE_CHECKING:
    from dagster._core.execution.context.system import (
        PlanExecutionContext,
        PlanOrchestrationContext,
    )
    from dagster._core.execution.plan.active import ActiveExecution
    from dagster._core.execution.plan.plan import ExecutionPlan
    from dagster._core.execution.plan.state import KnownExecutionState
    from dagster._core.execution.plan.step import ExecutionStep

INTERRUPT_POLL_SECONDS = 0.1
MOST_TOLD_AT_ONCE = 100


class CancellableAsyncExecutor(AsyncExecutor):
    """The async executor, with cancellation."""

    def _execution_iterator_wrapper(
        self, job_context: PlanExecutionContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        return super()._execution_iterator_wrapper(job_context, IndexedPlan(execution_plan))

    async def _async_execution_iterator(
        self, job_context: PlanExecutionContext, active: ActiveExecution
    ) -> AsyncIterator[dg.DagsterEvent]:
        _make_resources_once(job_context)
        events: asyncio.Queue[dg.DagsterEvent] = asyncio.Queue()
        tasks: set[asyncio.Task[None]] = set()
        interrupted = asyncio.Event()
        watcher = asyncio.create_task(_watch(tasks, interrupted))
        unblocked = True
        # All are in the log already. One by one, each would wake the run's main thread, which
        # only collects them.
        told: list[dg.DagsterEvent] = []
        try:
            while not active.is_complete and not interrupted.is_set():
                if unblocked:
                    self._start_steps(job_context, active, events, tasks)
                    told += active.concurrency_event_iterator(job_context)
                # Bounded, since a step that waits for its retry or for a pool's slot has no
                # task that could report anything, and so that an interrupt is seen.
                due = cast("float", active.sleep_interval())
                wait = min(due or INTERRUPT_POLL_SECONDS, INTERRUPT_POLL_SECONDS)
                event = await _next_event(events, wait)
                unblocked = event is None or self._may_unblock(event)
                if event is not None:
                    told += await self._handle(job_context, active, event)
                if event is None or len(told) >= MOST_TOLD_AT_ONCE:
                    for item in told:
                        yield item
                    told.clear()
            if interrupted.is_set():
                active.mark_interrupted()
                await _finish(tasks)
                told += await self._handle_rest(job_context, active, events)
            for item in told:
                yield item
            if interrupted.is_set():
                raise DagsterExecutionInterruptedError
        finally:
            watcher.cancel()
            for task in tasks:
                task.cancel()
            await _finish(tasks)

    def _start_steps(
        self,
        job_context: PlanExecutionContext,
        active: ActiveExecution,
        events: asyncio.Queue[dg.DagsterEvent],
        tasks: set[asyncio.Task[None]],
    ) -> None:
        for step in active.get_steps_to_execute(limit=None):
            work = self._run_step(job_context, active.get_known_state(), step, events)
            task = asyncio.create_task(work, name=step.key)
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _handle(
        self, job_context: PlanExecutionContext, active: ActiveExecution, event: dg.DagsterEvent
    ) -> list[dg.DagsterEvent]:
        """The event, and what follows from it."""
        active.handle_event(event)
        if not self._may_unblock(event):
            return [event]
        await _verify_if_complete(job_context, active, event)
        return [event, *active.plan_events_iterator(job_context)]

    async def _handle_rest(
        self,
        job_context: PlanExecutionContext,
        active: ActiveExecution,
        events: asyncio.Queue[dg.DagsterEvent],
    ) -> list[dg.DagsterEvent]:
        told: list[dg.DagsterEvent] = []
        while not events.empty():
            told += await self._handle(job_context, active, events.get_nowait())
        return told

    def _may_unblock(self, event: dg.DagsterEvent) -> bool:
        """Whether other steps could start, be skipped or be abandoned after this event.

        Looking for them takes time in proportion to all steps that are left, so that doing it
        after every event would make the cost of a fork grow with the number of forks.
        """
        return (
            event.is_step_success
            or event.is_step_failure
            or event.is_step_skipped
            or event.is_step_up_for_retry
            or event.is_resource_init_failure
            or not self.step_dependency_config.require_upstream_step_success
        )

    async def _run_step(
        self,
        job_context: PlanExecutionContext,
        known_state: KnownExecutionState,
        step: ExecutionStep,
        events: asyncio.Queue[dg.DagsterEvent],
    ) -> None:
        step_context = job_context.for_step(step, known_state)
        step_events: list[dg.DagsterEvent] = []
        # The interrupt was reported as the step's failure; the run ends with it.
        with contextlib.suppress(DagsterExecutionInterruptedError):
            if is_plain(step_context):
                async for event in plain_step_events(step_context):
                    events.put_nowait(event)
                return
            async for event in dagster_event_sequence_for_step(step_context):
                events.put_nowait(event)
                step_events.append(event)
            async for event in _trigger_hook(step_context, step_events):
                events.put_nowait(event)


class _ResourcesMadeOnce(ScopedResourcesBuilder):
    """Dagster makes two classes for the resources of a step, of its output and of their types.

    For each step anew, which was a twentieth of the loop's time; what they give is the same.
    """

    def __new__(cls, builder: ScopedResourcesBuilder) -> Self:
        """As the given one."""
        made = super().__new__(cls, *builder)
        made.known = {}
        return made

    known: dict[frozenset[str], Resources]

    def build(self, required_resource_keys: AbstractSet[str] | None) -> Resources:
        """See `ScopedResourcesBuilder.build`."""
        keys = frozenset(required_resource_keys or ())
        if keys not in self.known:
            self.known[keys] = super().build(keys)
        return self.known[keys]


def _make_resources_once(job_context: PlanExecutionContext) -> None:
    data = job_context._execution_data
    builder = _ResourcesMadeOnce(data.scoped_resources_builder)
    job_context._execution_data = data._replace(scoped_resources_builder=builder)


async def _watch(tasks: set[asyncio.Task[None]], interrupted: asyncio.Event) -> None:
    # Set by a signal handler, which knows nothing of this loop.
    while not check_captured_interrupt():  # noqa: ASYNC110
        await asyncio.sleep(INTERRUPT_POLL_SECONDS)
    interrupted.set()
    for task in tasks:
        task.cancel()


async def _next_event(
    events: asyncio.Queue[dg.DagsterEvent], seconds: float
) -> dg.DagsterEvent | None:
    if not events.empty():
        # In a burst of events, others have their turn between two.
        await asyncio.sleep(0)
        return events.get_nowait()
    with contextlib.suppress(TimeoutError):
        # Unlike `wait_for`, without a task for each event.
        async with asyncio.timeout(seconds):
            return await events.get()
    return None


async def _finish(tasks: set[asyncio.Task[None]]) -> None:
    if tasks:
        await asyncio.wait(set(tasks))


class GuardedExecutor(Executor):
    """Any executor, under guard: see `guarded`."""

    def __init__(self, inner: Executor) -> None:
        self._inner = inner

    @property
    def retries(self) -> RetryMode:
        """See Dagster's `Executor.retries`."""
        return self._inner.retries

    @property
    def step_dependency_config(self) -> StepDependencyConfig:
        """See Dagster's `Executor.step_dependency_config`."""
        return self._inner.step_dependency_config

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        """See Dagster's `Executor.execute`."""
        with guarded(plan_context.instance, plan_context.run_id):
            yield from self._inner.execute(plan_context, execution_plan)


@dg.executor(name="sandbox_async", config_schema=cast("Any", async_executor.config_schema))
def sandbox_async_executor(init_context: dg.InitExecutorContext) -> GuardedExecutor:
    """All ops on one event loop of the run's worker."""
    config = cast("dict[str, Any]", init_context.executor_config)
    return GuardedExecutor(
        CancellableAsyncExecutor(
            retries=RetryMode.from_config(config["retries"]) or RetryMode.ENABLED,
            max_concurrent=config.get("max_concurrent"),
            tag_concurrency_limits=config.get("tag_concurrency_limits"),
            step_dependency_config=StepDependencyConfig.from_config(
                config.get("step_dependency_config")
            ),
        )
    )


@dg.executor(
    name="sandbox_multiprocess",
    config_schema=cast("Any", dg.multiprocess_executor.config_schema),
    requirements=multiple_process_executor_requirements(),
)
def sandbox_multiprocess_executor(init_context: dg.InitExecutorContext) -> GuardedExecutor:
    """A process for every op."""
    return GuardedExecutor(
        _core_multiprocess_executor_creation(cast("Any", init_context.executor_config))
    )
