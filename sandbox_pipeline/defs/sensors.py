"""Watches over the deployment from the daemon."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import dagster as dg

from sandbox_pipeline.defs.guard import instance_home
from sandbox_pipeline.defs.reconciling import reconcile_runs
from sandbox_pipeline.reaper import Reaped, ask_to_cancel, reap
from sandbox_pipeline.runtime import Runtime

REAP_EVERY_SECONDS = 60
LOOK_EVERY_SECONDS = 5


@dg.sensor(
    minimum_interval_seconds=REAP_EVERY_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends sandboxes that nobody owns any more, as `sandbox-pipeline reap` does, and "
    "marks runs whose worker is dead as failed.",
)
def sandbox_reaper(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Never launches a run: what it does is the sensor's whole work."""

    async def work(runtime: Runtime) -> Sequence[Reaped]:
        dead = await reconcile_runs(context.instance, runtime)
        for run_id in dead:
            context.log.info(f"run {run_id} is dead")  # noqa: G004 - Dagster's log has no lazy arguments
        return await reap(runtime)

    count = _with_runtime(context, work)
    return dg.SkipReason(f"{count} sandboxes reaped" if count else "nothing to reap")


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.FAILURE,
    minimum_interval_seconds=LOOK_EVERY_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends what a failed run left and a resume could not use.",
)
def sandbox_reaper_on_failure(context: dg.RunStatusSensorContext) -> None:
    """Running agents are left for a resume, which Dagster's run retries may start just now."""
    run_id = context.dagster_run.run_id
    _with_runtime(context, lambda runtime: reap(runtime, ended_run=run_id))


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.CANCELED,
    minimum_interval_seconds=LOOK_EVERY_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends every sandbox of a cancelled run whose worker could not do it.",
)
def sandbox_reaper_on_cancel(context: dg.RunStatusSensorContext) -> None:
    """A forced termination changes the run's status only."""
    run_id = context.dagster_run.run_id

    async def work(runtime: Runtime) -> Sequence[Reaped]:
        await ask_to_cancel(runtime, run_id)
        return await reap(runtime)

    _with_runtime(context, work)


def _with_runtime(
    context: dg.SensorEvaluationContext | dg.RunStatusSensorContext,
    work: Callable[[Runtime], Awaitable[Sequence[Reaped]]],
) -> int:
    home = instance_home(context.instance)

    async def call() -> int:
        runtime = Runtime.open(home=home)
        try:
            reaped = await work(runtime)
        finally:
            await runtime.close()
        for item in reaped:
            context.log.info(str(item))
        return len(reaped)

    return asyncio.run(call())


SENSORS = [sandbox_reaper, sandbox_reaper_on_failure, sandbox_reaper_on_cancel]
