"""The ops. They adapt; what happens is decided in `lifecycle` and `orchestrating`."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from sandbox_pipeline import orchestrating
from sandbox_pipeline.config import OrchestrationConfig, parse_config
from sandbox_pipeline.defs.executors import check_place
from sandbox_pipeline.defs.frames import FRAME, Frame
from sandbox_pipeline.defs.interrupts import interruptible
from sandbox_pipeline.defs.presentation import asked_tags, fork_metrics_metadata, outcome_tags
from sandbox_pipeline.defs.reconciling import report_dead
from sandbox_pipeline.defs.resources import RUNTIME
from sandbox_pipeline.errors import PipelineError
from sandbox_pipeline.lifecycle import ForkLife
from sandbox_pipeline.metrics import frame
from sandbox_pipeline.plugins import resolve_provider
from sandbox_pipeline.reaper import reap
from sandbox_pipeline.records import (
    Event,
    ForkRef,
    Orchestration,
    fork_num_of,
    mapping_key,
    orchestration_key,
)
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.report import write_report
from sandbox_pipeline.runtime import Announce, Runtime
from sandbox_pipeline.store import tables

T = TypeVar("T")

ERROR_TYPE = "error_type"
WORKFLOW_TAG = "sandbox_pipeline/workflow_id"

# Dependencies carry only the order. Values would cost three events and two files for each step,
# half of what Dagster needs for it, and a storage that all processes share; the store has them.
_AFTER = {"after": dg.In(dg.Nothing)}


def _priority(step: int) -> dict[str, str]:
    """Later stages first: a fork that has a sandbox is finished before another gets one."""
    return {"dagster/priority": str(step)}


@dg.op(
    config_schema={"orchestration": dg.Permissive()},
    out=dg.DynamicOut(dg.Nothing),
    required_resource_keys={RUNTIME},
    tags=_priority(0),
)
async def orchestrate(context: dg.OpExecutionContext) -> AsyncIterator[dg.DynamicOutput[None]]:
    """Pin the repository's commit, run the setup once, and plan the forks."""
    config = parse_config(context.op_config["orchestration"])
    run = context.run
    # Retries and re-executions of a run share its root: they resume the same orchestration.
    workflow_id = config.workflow_id or f"wf-{(run.root_run_id or run.run_id)[:8]}"
    context.instance.add_run_tags(run.run_id, {WORKFLOW_TAG: workflow_id, **asked_tags(config)})
    refs = await _adapted(_begin(context, config, workflow_id))
    for ref in refs:
        yield dg.DynamicOutput(None, mapping_key=mapping_key(ref.fork_num))


@dg.op(ins=_AFTER, required_resource_keys={RUNTIME}, tags=_priority(1))
async def create_sandbox(context: dg.OpExecutionContext) -> None:
    """Wait for a slot, then create the fork's sandbox with the repository in it."""
    await _adapted(_life(context).create_sandbox())


@dg.op(ins=_AFTER, required_resource_keys={RUNTIME}, tags=_priority(2))
async def health_check(context: dg.OpExecutionContext) -> None:
    """Let only a healthy sandbox through."""
    await _adapted(_life(context).health_check())


@dg.op(ins=_AFTER, required_resource_keys={RUNTIME}, tags=_priority(3))
async def run_agent(context: dg.OpExecutionContext) -> None:
    """Run the agent on the prompt, and take its patch."""
    await _adapted(_life(context).run_agent())


@dg.op(ins=_AFTER, required_resource_keys={RUNTIME}, tags=_priority(4))
async def record_metrics(context: dg.OpExecutionContext) -> None:
    """Record what the fork and its sandbox used."""
    await _adapted(_life(context).record_metrics())


@dg.op(ins=_AFTER, required_resource_keys={RUNTIME}, tags=_priority(5))
async def cleanup_sandbox(context: dg.OpExecutionContext) -> None:
    """End the fork's sandbox, whatever happened before."""
    await _adapted(_life(context).cleanup_sandbox())


@dg.op(ins=_AFTER, required_resource_keys={RUNTIME}, tags=_priority(6))
async def verify_patch(context: dg.OpExecutionContext) -> None:
    """Try the patch in a fresh sandbox, where there is a verify_command."""
    await _adapted(_life(context).verify_patch())


@dg.op(ins=_AFTER, out=dg.Out(FRAME), required_resource_keys={RUNTIME}, tags=_priority(7))
async def check_completion(context: dg.OpExecutionContext) -> Frame:
    """Compare what came with what was planned; one row for every planned fork."""
    done = await _adapted(
        orchestrating.complete(
            _runtime(context), _workflow_id(context), context.run_id, _announce(context)
        )
    )
    context.instance.add_run_tags(context.run_id, outcome_tags(done))
    metadata = fork_metrics_metadata(done)
    report = await _report(context, done)
    if report is not None:
        metadata["report"] = dg.MetadataValue.path(report)
    if done.error is not None:
        # The rows are worth showing, but a failed step has no output to attach them to.
        raise dg.Failure(description=done.error, metadata=metadata, allow_retries=False)
    context.add_output_metadata(metadata)
    return frame(tables.fork_metrics, done.rows)


async def _report(context: dg.OpExecutionContext, done: orchestrating.Completed) -> Path | None:
    """Write the report; what is wrong with it is no reason to lose the results."""
    runtime = _runtime(context)
    orchestration = done.orchestration
    forks = await runtime.store.forks(orchestration.workflow_id)
    redactor = runtime.redactor(orchestration)
    try:
        return await asyncio.to_thread(write_report, orchestration, forks, redactor)
    except (OSError, ValueError) as error:
        context.log.warning("no report: %s", error)
        return None


def _runtime(context: dg.OpExecutionContext) -> Runtime:
    return getattr(context.resources, RUNTIME)


def _life(context: dg.OpExecutionContext) -> ForkLife:
    number = fork_num_of(context.get_mapping_key() or "")
    fork = ForkRef(workflow_id=_workflow_id(context), fork_num=number)
    return ForkLife(_runtime(context), fork, context.run_id, _announce(context))


def _workflow_id(context: dg.OpExecutionContext) -> str:
    """What this run is of, which its first op wrote to its tags; looked up once a process."""
    runtime = _runtime(context)
    if runtime.workflow_id is None:
        run = context.instance.get_run_by_id(context.run_id)
        runtime.workflow_id = None if run is None else run.tags.get(WORKFLOW_TAG)
    if runtime.workflow_id is None:
        msg = f"run {context.run_id} has no tag {WORKFLOW_TAG}: its step 'orchestrate' was not run"
        raise dg.Failure(msg, allow_retries=False)
    return runtime.workflow_id


def _announce(context: dg.OpExecutionContext) -> Announce:
    def announce(event: Event) -> None:
        details = " ".join(f"{name}={json.dumps(value)}" for name, value in event.payload.items())
        fork = "" if event.fork_num is None else f" fork={event.fork_num}"
        context.log.info(f"{event.name}{fork} {details}".rstrip())

    return announce


async def _begin(
    context: dg.OpExecutionContext, config: OrchestrationConfig, workflow_id: str
) -> list[ForkRef]:
    runtime = _runtime(context)
    provider = resolve_provider(config, runtime.environ)
    executor = context.job_def.executor_def.name.removeprefix("sandbox_")
    check_place(executor, provider, runtime.settings.db_url)
    refs = await orchestrating.begin(
        runtime,
        config,
        workflow_id,
        context.run_id,
        previous_ended=await _previous_ended(context, workflow_id),
        announce=_announce(context),
    )
    for item in await reap(runtime):
        context.log.info(str(item))
    return refs


async def _previous_ended(context: dg.OpExecutionContext, workflow_id: str) -> bool:
    store = _runtime(context).store
    orchestration = await store.get(Orchestration, orchestration_key(workflow_id))
    if orchestration is None or orchestration.owner is None:
        return True
    owner = orchestration.owner
    if owner.run_id == context.run_id:
        return True
    # This run takes its place, so no other one is wanted.
    report_dead(context.instance, orchestration, retry=False)
    run = context.instance.get_run_by_id(owner.run_id)
    return run is not None and run.is_finished


async def _adapted(work: Coroutine[Any, Any, T]) -> T:
    """Dagster's words for being cancelled, and for an error that needs no stack trace."""
    try:
        with interruptible():
            return await work
    except asyncio.CancelledError:
        raise DagsterExecutionInterruptedError from None
    except PipelineError as error:
        metadata = {ERROR_TYPE: type(error).__name__}
        text = str(error)
        cleaned = Redactor.from_environ(os.environ).text(text)
        # The chain of causes would show what was taken out here.
        cause = error if cleaned == text else None
        raise dg.Failure(cleaned, metadata=metadata, allow_retries=False) from cause
