"""Steps start, are skipped and are abandoned as with Dagster's own executor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from dagster import reconstructable

from sandbox_pipeline.defs.executor import sandbox_async_executor
from sandbox_pipeline.defs.ready_steps import IndexedExecution, IndexedPlan

FORKS = 6


@dg.op(out=dg.DynamicOut(int))
def forks() -> Iterator[dg.DynamicOutput[int]]:
    for number in range(FORKS):
        yield dg.DynamicOutput(number, mapping_key=f"fork_{number}")


@dg.op(retry_policy=dg.RetryPolicy(max_retries=2))
def begin(context: dg.OpExecutionContext, number: int) -> int:
    if number == 1:
        msg = "fails at once"
        raise dg.Failure(msg, allow_retries=False)
    if number == 2 and context.retry_number == 0:
        msg = "fails once"
        raise ValueError(msg)
    return number


@dg.op(out=dg.Out(int, is_required=False))
def go_on(number: int) -> Iterator[dg.Output[int]]:
    if number != 3:
        yield dg.Output(number)


@dg.op
def end(number: int) -> int:
    return number


@dg.op
def collect(numbers: list[int]) -> int:
    return len(numbers)


@dg.op
def after(_count: int) -> None:
    pass


@dg.graph
def lives() -> None:
    begun = forks().map(begin)
    ended = begun.map(go_on).map(end)
    after(collect(ended.collect()))


@dg.graph
def lives_without_failure() -> None:
    ended = forks().map(go_on).map(end)
    after(collect(ended.collect()))


def lives_here() -> dg.JobDefinition:
    return lives.to_job(name="here", executor_def=sandbox_async_executor)


def lives_with_dagster() -> dg.JobDefinition:
    return lives.to_job(name="with_dagster", executor_def=dg.in_process_executor)


def no_failure_here() -> dg.JobDefinition:
    return lives_without_failure.to_job(name="here", executor_def=sandbox_async_executor)


def no_failure_with_dagster() -> dg.JobDefinition:
    return lives_without_failure.to_job(name="dagsters", executor_def=dg.in_process_executor)


def told(job: object, instance: dg.DagsterInstance) -> dict[str, list[str]]:
    """Of each step: the kinds of its events."""
    found: dict[str, list[str]] = {}
    with dg.execute_job(reconstructable(job), instance=instance) as result:  # pyright: ignore[reportArgumentType, reportUnknownMemberType]
        for event in result.all_events:
            if event.is_step_event:
                found.setdefault(event.step_key or "", []).append(event.event_type_value)
    return found


@pytest.mark.parametrize(
    ("here", "with_dagster", "fails"),
    [
        (lives_here, lives_with_dagster, True),
        (no_failure_here, no_failure_with_dagster, False),
    ],
)
def test_what_becomes_of_each_step_is_what_dagster_makes_of_it(
    here: object, with_dagster: object, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[IndexedPlan] = []

    def start(plan: IndexedPlan, **options: Any) -> IndexedExecution:
        used.append(plan)
        return IndexedExecution(plan, **options)

    monkeypatch.setattr(IndexedPlan, "start", start)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        mine = told(here, instance)
        assert used, "not what the executor uses"
        assert mine == told(with_dagster, instance)
    kinds = {kind for events in mine.values() for kind in events}
    assert "STEP_SKIPPED" in kinds
    assert ("STEP_FAILURE" in kinds) is fails
    assert ("STEP_UP_FOR_RETRY" in kinds) is fails
    assert ("after" in mine) is not fails
