"""Watches over the deployment from the daemon."""

import asyncio

import dagster as dg

from sandbox_pipeline.defs.guard import instance_home
from sandbox_pipeline.reaper import reap
from sandbox_pipeline.runtime import Runtime

REAP_EVERY_SECONDS = 60


@dg.sensor(
    minimum_interval_seconds=REAP_EVERY_SECONDS,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends sandboxes that nobody owns any more; `sandbox-pipeline reap` does the same.",
)
def sandbox_reaper(context: dg.SensorEvaluationContext) -> dg.SkipReason:
    """Never launches a run: what it does is the sensor's whole work."""
    home = instance_home(context.instance)

    async def work() -> int:
        runtime = Runtime.open(home=home)
        try:
            reaped = await reap(runtime)
        finally:
            await runtime.close()
        for item in reaped:
            context.log.info(f"ended {item.provider} {item.sandbox_id}: {item.reason}")  # noqa: G004 - Dagster's log has no lazy arguments
        return len(reaped)

    count = asyncio.run(work())
    return dg.SkipReason(f"{count} sandboxes reaped" if count else "nothing to reap")
