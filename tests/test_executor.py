"""The executor keeps what Dagster promises: order, retries, hooks, failures, priorities, limits."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import reconstructable
from dagster._core.errors import DagsterExecutionInterruptedError

from sandbox_pipeline.defs.executor import sandbox_async_executor
from sandbox_pipeline.defs.interrupts import interruptible

SEEN: list[str] = []


@dg.success_hook
def note_success(context: dg.HookContext) -> None:
    SEEN.append(f"hook {context.op.name}")


@dg.op(out=dg.DynamicOut(int))
async def numbers() -> AsyncIterator[dg.DynamicOutput[int]]:
    for number in range(4):
        yield dg.DynamicOutput(number, mapping_key=f"n{number}")


@dg.op
async def wait(number: int) -> int:
    await asyncio.sleep(0.3)
    return number


@dg.op
def double(number: int) -> int:
    return number * 2


@dg.op
async def total(numbers: list[int]) -> int:
    return sum(numbers)


@dg.job(executor_def=sandbox_async_executor, hooks={note_success})
def mapped() -> None:
    def one(number: Any) -> Any:
        return double(wait(number))

    total(numbers().map(one).collect())


@dg.op(retry_policy=dg.RetryPolicy(max_retries=2, delay=0.1))
async def third_time_lucky(context: dg.OpExecutionContext) -> str:
    SEEN.append(f"try {context.retry_number}")
    if context.retry_number < 2:
        msg = "not yet"
        raise ValueError(msg)
    return "ok"


@dg.op
async def fails() -> int:
    msg = "always"
    raise RuntimeError(msg)


@dg.op
async def after_failure(number: int) -> None:
    SEEN.append("must not run")


@dg.op
async def beside() -> None:
    SEEN.append("beside")


@dg.job(executor_def=sandbox_async_executor)
def retried() -> None:
    third_time_lucky()


@dg.job(executor_def=sandbox_async_executor)
def failing() -> None:
    after_failure(fails())
    beside()


def _noted(name: str, priority: int) -> dg.OpDefinition:
    @dg.op(name=name, tags={"dagster/priority": str(priority)})
    async def noted() -> None:
        SEEN.append(name)
        await asyncio.sleep(0.05)

    return noted


@dg.job(executor_def=sandbox_async_executor)
def prioritized() -> None:
    for name, priority in (("low", 1), ("high", 9), ("middle", 5)):
        _noted(name, priority)()


@dg.resource
def noted_resource(context: dg.InitResourceContext) -> Iterator[str]:
    SEEN.append("set up")
    yield "r"
    SEEN.append("torn down")


@dg.op(required_resource_keys={"noted"})
async def uses_resource(context: dg.OpExecutionContext) -> None:
    SEEN.append(context.resources.noted)


@dg.job(executor_def=sandbox_async_executor, resource_defs={"noted": noted_resource})
def with_resource() -> None:
    uses_resource()


@pytest.fixture(autouse=True)
def fresh() -> None:
    SEEN.clear()


def execute(
    home: Path, job: dg.JobDefinition, *, success: bool = True, **config: object
) -> dg.JobExecutionResult:
    with dg.DagsterInstance.get() as instance:
        result = dg.execute_job(
            reconstructable(globals()[job.name]),
            instance=instance,
            run_config={"execution": {"config": config}},
        )
        assert result.success is success
        events = [event.event_type_value for event in result.all_events]
        assert events[-1] == ("PIPELINE_SUCCESS" if success else "PIPELINE_FAILURE")
        return result


def test_mapped_coroutines_wait_together_and_sync_ops_work_beside_them(home: Path) -> None:
    result = execute(home, mapped)
    starts = [event for event in result.all_events if event.event_type_value == "STEP_START"]
    assert len(starts) == 1 + 4 + 4 + 1
    first_end = next(
        n for n, event in enumerate(result.all_events)
        if event.event_type_value == "STEP_SUCCESS" and "wait" in (event.step_key or "")
    )  # fmt: skip
    waiting = [
        event for event in result.all_events[:first_end]
        if event.event_type_value == "STEP_START" and "wait" in (event.step_key or "")
    ]  # fmt: skip
    assert len(waiting) == 4, "all were started before the first was done"
    assert SEEN.count("hook wait") == 4
    for step in {event.step_key for event in starts}:
        kinds = [event.event_type_value for event in result.all_events if event.step_key == step]
        assert kinds.index("STEP_START") < kinds.index("STEP_OUTPUT") < kinds.index("STEP_SUCCESS")


def test_a_retry_policy_with_a_delay_is_kept(home: Path) -> None:
    result = execute(home, retried)
    assert SEEN == ["try 0", "try 1", "try 2"]
    kinds = [event.event_type_value for event in result.all_events]
    assert kinds.count("STEP_UP_FOR_RETRY") == 2


def test_a_failed_step_fails_the_run_and_only_what_depends_on_it(home: Path) -> None:
    execute(home, failing, success=False)
    assert SEEN == ["beside"]


def test_priorities_decide_when_there_is_a_limit(home: Path) -> None:
    execute(home, prioritized, max_concurrent=1)
    assert SEEN == ["high", "middle", "low"]


def test_resources_are_torn_down_once(home: Path) -> None:
    execute(home, with_resource)
    assert SEEN == ["set up", "r", "torn down"]


async def _interrupted_in_a_callback() -> None:
    """Wait under `interruptible`, until a signal comes while a callback of the loop runs."""
    asyncio.get_running_loop().call_later(0.05, os.kill, os.getpid(), signal.SIGINT)
    with interruptible():
        try:
            await asyncio.sleep(60)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.1)
            SEEN.append("cleaned up")


def test_an_interrupt_that_hits_a_callback_still_cancels_the_op_and_a_second_changes_nothing() -> (
    None
):
    def as_in_a_steps_process(*_: object) -> None:
        raise DagsterExecutionInterruptedError

    before = signal.signal(signal.SIGINT, as_in_a_steps_process)
    try:
        with pytest.raises(asyncio.CancelledError):
            asyncio.run(_interrupted_in_a_callback())
        assert SEEN == ["cleaned up"]
        assert signal.getsignal(signal.SIGINT) is as_in_a_steps_process
    finally:
        signal.signal(signal.SIGINT, before)
