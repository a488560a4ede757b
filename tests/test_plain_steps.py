"""A step without values is told of as Dagster itself would tell of it."""

from pathlib import Path

import dagster as dg
import pytest
from dagster import reconstructable

from sandbox_pipeline.defs import ops
from sandbox_pipeline.defs.executor import sandbox_async_executor
from sandbox_pipeline.defs.plain_steps import hands_on_order_only

AFTER = {"after": dg.In(dg.Nothing)}
NONE = dg.Out(dg.Nothing)


@dg.op(out=NONE)
async def first(context: dg.OpExecutionContext) -> None:
    context.log.info("a word of %s", context.op.name)


@dg.op(ins=AFTER, out=NONE)
async def second(context: dg.OpExecutionContext) -> None:
    assert context.retry_number == 0


@dg.op(ins=AFTER, out=NONE)
async def refuses(context: dg.OpExecutionContext) -> None:
    msg = f"{context.op.name} said no"
    raise dg.Failure(msg, metadata={"kind": "a"}, allow_retries=False)


@dg.op(ins=AFTER, out=NONE)
async def breaks(context: dg.OpExecutionContext) -> None:
    msg = f"{context.op.name} is broken"
    raise ValueError(msg)


@dg.op(ins=AFTER, out=NONE)
async def breaks_dagsters_rules(context: dg.OpExecutionContext) -> None:
    msg = f"not so, {context.op.name}"
    raise dg.DagsterInvariantViolationError(msg)


@dg.op(ins=AFTER, out=NONE)
async def skipped(context: dg.OpExecutionContext) -> None:
    context.log.error("never run")


@dg.graph
def all_kinds() -> None:
    begun = first()
    second(begun)
    skipped(refuses(begun))
    breaks(begun)
    breaks_dagsters_rules(begun)


def ours() -> dg.JobDefinition:
    return all_kinds.to_job(name="ours", executor_def=sandbox_async_executor)


def dagsters() -> dg.JobDefinition:
    return all_kinds.to_job(name="dagsters", executor_def=dg.in_process_executor)


@dg.op(out=NONE)
async def gives_a_value(context: dg.OpExecutionContext) -> int:
    return len(context.op.name)


@dg.job(executor_def=sandbox_async_executor)
def with_a_value() -> None:
    gives_a_value()


def told(job: object, instance: dg.DagsterInstance) -> dict[str, list[tuple[object, ...]]]:
    """Of each step: kind of event, and what it says of output, failure and cause."""
    found: dict[str, list[tuple[object, ...]]] = {}
    with dg.execute_job(reconstructable(job), instance=instance) as result:  # pyright: ignore[reportArgumentType, reportUnknownMemberType]
        assert not result.success
        for event in result.all_events:
            if event.step_key is None or not event.is_step_event:
                continue
            said: tuple[object, ...] = (event.event_type_value,)
            if event.is_successful_output:
                data = event.step_output_data
                said += (data.step_output_handle, data.type_check_data, data.metadata)
            if event.is_step_failure:
                failure = event.step_failure_data
                error = failure.error
                said += (failure.user_failure_data, failure.error_source, event.message)
                while error is not None:
                    said += (error.cls_name, error.message)
                    error = error.cause
            found.setdefault(event.step_key, []).append(said)
    return found


@pytest.fixture
def instance(tmp_path: Path) -> dg.DagsterInstance:
    return dg.DagsterInstance.local_temp(str(tmp_path))


def test_what_is_told_is_what_dagster_tells(instance: dg.DagsterInstance) -> None:
    mine = told(ours, instance)
    assert mine == told(dagsters, instance)
    kinds = {step: [said[0] for said in events] for step, events in mine.items()}
    assert kinds["second"] == ["STEP_START", "STEP_OUTPUT", "STEP_SUCCESS"]
    assert "skipped" not in kinds
    for step in ("refuses", "breaks", "breaks_dagsters_rules"):
        assert kinds[step] == ["STEP_START", "STEP_FAILURE"]


def test_logged_words_keep_their_step(instance: dg.DagsterInstance) -> None:
    with dg.execute_job(reconstructable(ours), instance=instance) as result:  # pyright: ignore[reportArgumentType]
        run_id = result.run_id
    words = [it for it in instance.all_logs(run_id) if "a word of first" in it.user_message]
    assert [it.step_key for it in words] == ["first"]


def test_a_value_that_nobody_would_get_fails_the_step(instance: dg.DagsterInstance) -> None:
    with dg.execute_job(reconstructable(with_a_value), instance=instance) as result:  # pyright: ignore[reportArgumentType]
        (failure,) = [event for event in result.all_events if event.is_step_failure]
    error = failure.step_failure_data.error
    assert error is not None
    assert "gave a value or an event" in error.message


def test_all_ops_of_a_fork_are_of_this_kind() -> None:
    of_a_fork = [
        ops.create_sandbox, ops.health_check, ops.run_agent, ops.record_metrics,
        ops.cleanup_sandbox, ops.verify_patch,
    ]  # fmt: skip
    assert all(map(hands_on_order_only, of_a_fork))
    assert not hands_on_order_only(ops.orchestrate)
    assert not hands_on_order_only(ops.check_completion)
