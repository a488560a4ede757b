"""What agents at work have done so far, kept when the whole orchestration is cancelled."""

from __future__ import annotations

import asyncio
import logging

from sandbox_pipeline.agent_stage import AgentStage
from sandbox_pipeline.errors import AgentError, ProviderError
from sandbox_pipeline.fork_sandboxes import ForkSandboxes
from sandbox_pipeline.journal import ForkJournal
from sandbox_pipeline.records import Fork, ForkRef, Orchestration, Stage
from sandbox_pipeline.runtime import Runtime, silent

logger = logging.getLogger(__name__)

SALVAGE_SECONDS = 5.0
"""For all forks together, which are at it at once: a cancel has to be over soon."""


async def salvage(runtime: Runtime, orchestration: Orchestration) -> None:
    """Stop every agent that is at work, and keep its patch, or the result that it had left.

    Takes little longer than `SALVAGE_SECONDS`, whatever the sandboxes do: a fork whose patch is
    not here by then goes without. Forks that are not at work are left as they are.

    Args:
        runtime: of this process.
        orchestration: as stored; cancelled, and nobody works on it any more.

    Raises:
        OwnershipError: a run has taken it over.
        StoreError: the store can't be written.
    """
    if orchestration.owner is None:
        return
    run_id = orchestration.owner.run_id
    forks = await runtime.store.forks(orchestration.workflow_id)
    tasks = {
        asyncio.create_task(_keep(runtime, orchestration, fork, run_id)): fork
        for fork in forks
        if fork.stage is Stage.AGENT and not fork.outcome.is_terminal
    }
    if not tasks:
        return
    done, late = await asyncio.wait(tasks, timeout=SALVAGE_SECONDS)
    for task in late:
        logger.warning("%s: its patch took too long", tasks[task].key)
        task.cancel()
    if late:
        await asyncio.wait(late, timeout=1)
    for task in done:
        task.result()


async def _keep(runtime: Runtime, orchestration: Orchestration, fork: Fork, run_id: str) -> None:
    ref = ForkRef(workflow_id=fork.workflow_id, fork_num=fork.fork_num)
    journal = ForkJournal(runtime, ref, run_id, silent)
    sandboxes = ForkSandboxes(runtime, ref, run_id, journal)
    stage = AgentStage(runtime, ref, journal, sandboxes, lambda: runtime.orders.watch(ref, run_id))
    try:
        await sandboxes.check_lease(fork.sandbox_id or "")
        await stage.break_off(fork, orchestration)
    except (ProviderError, AgentError, OSError) as error:
        logger.warning("%s: no patch of what it had done: %s", fork.key, error)
