"""Tells Dagster of runs whose worker is dead, which it may not have noticed.

When a whole `dagster dev` or a machine dies, Dagster goes on showing the run as started. Marked
as failed it is run again by Dagster's own retries, if they are on, and resumes.
"""

import logging

import dagster as dg

from sandbox_pipeline.ownership import is_dead
from sandbox_pipeline.records import Orchestration
from sandbox_pipeline.runtime import Runtime

logger = logging.getLogger(__name__)

MAX_RETRIES_TAG = "dagster/max_retries"


async def reconcile_runs(instance: dg.DagsterInstance, runtime: Runtime) -> list[str]:
    """End in Dagster the runs that own an orchestration and whose worker is dead; their ids."""
    unfinished = await runtime.store.orchestrations(limit=10_000, unfinished_only=True)
    return [
        it.owner.run_id
        for it in unfinished
        if it.owner is not None and report_dead(instance, it, retry=True)
    ]


def report_dead(instance: dg.DagsterInstance, orchestration: Orchestration, *, retry: bool) -> bool:
    """End in Dagster the run that owns this orchestration, if its worker is dead.

    Args:
        instance: of Dagster.
        orchestration: as stored.
        retry: whether Dagster may run it again.
    """
    owner = orchestration.owner
    if owner is None or not is_dead(owner):
        return False
    run = instance.get_run_by_id(owner.run_id)
    if run is None or run.is_finished:
        return False
    message = f"The worker of this run is dead (process {owner.pid}); its sandboxes were left."
    if run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, message=message)
        return True
    if not retry:
        instance.add_run_tags(run.run_id, {MAX_RETRIES_TAG: "0"})
    instance.report_run_failed(run, message)
    logger.warning("run %s: %s", run.run_id, message)
    return True
