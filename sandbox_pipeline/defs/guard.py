"""Stands by a run in its worker process, whichever executor runs the ops.

While the run lasts it keeps the ownership of the run's orchestrations alive and turns a cancel
asked for in the store into the interrupt that Dagster knows. When the run is cancelled it ends
every sandbox and marks every fork, those between two ops included. A worker that is stopped
without a cancel (a restart of the machine, say) leaves sandboxes and agents alone: the next run
re-attaches to them, or their time-to-live ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import threading
from collections.abc import Generator
from pathlib import Path

import dagster as dg

from sandbox_pipeline.clock import now
from sandbox_pipeline.orchestrating import settle_cancelled
from sandbox_pipeline.ownership import HEARTBEAT_SECONDS
from sandbox_pipeline.records import Control, Orchestration
from sandbox_pipeline.runtime import Runtime

logger = logging.getLogger(__name__)

CONTROL_POLL_SECONDS = 0.5
INTERACTIVE_TAG = "sandbox_pipeline/interactive"
"""On runs whose worker is a person's terminal, where an interrupt is a cancel."""


@contextlib.contextmanager
def guarded(instance: dg.DagsterInstance, run_id: str) -> Generator[None]:
    """Guard the run while the block runs, and settle it if it was cancelled."""
    home = instance_home(instance)
    over = threading.Event()
    watcher = threading.Thread(
        target=lambda: asyncio.run(_watch(instance, home, run_id, over)), name="run-guard"
    )
    watcher.start()
    try:
        yield
    except BaseException:
        _ask_to_cancel_if_interactive(instance, run_id)
        raise
    finally:
        over.set()
        watcher.join()
        if is_cancelled(instance, run_id):
            asyncio.run(_settle(home, run_id))


def instance_home(instance: dg.DagsterInstance) -> Path | None:
    """Folder of the Dagster instance; None where it has none that lasts."""
    if instance.is_ephemeral or not instance.is_persistent:
        return None
    return Path(instance.root_directory)


def is_cancelled(instance: dg.DagsterInstance, run_id: str) -> bool:
    """Whether somebody asked to end the run."""
    run = instance.get_run_by_id(run_id)
    return run is not None and run.status in (
        dg.DagsterRunStatus.CANCELING,
        dg.DagsterRunStatus.CANCELED,
    )


def _ask_to_cancel_if_interactive(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is not None and INTERACTIVE_TAG in run.tags and not is_cancelled(instance, run_id):
        instance.report_run_canceling(run, message="Interrupted at the terminal.")


async def _watch(
    instance: dg.DagsterInstance, home: Path | None, run_id: str, over: threading.Event
) -> None:
    runtime = Runtime.open(home=home)
    interrupted = False
    last_beat = 0.0
    try:
        while not over.is_set():
            await asyncio.sleep(CONTROL_POLL_SECONDS)
            mine = await _owned(runtime, run_id)
            if mine and now().monotonic - last_beat > HEARTBEAT_SECONDS:
                last_beat = now().monotonic
                for orchestration in mine:
                    await runtime.store.update(
                        Orchestration, orchestration.key, lambda it: _beaten(it, run_id)
                    )
            if not interrupted and any(it.control is Control.CANCEL for it in mine):
                interrupted = True
                run = instance.get_run_by_id(run_id)
                if run is not None and not is_cancelled(instance, run_id):
                    instance.report_run_canceling(run, message="Cancelled by command.")
                os.kill(os.getpid(), signal.SIGINT)
    except Exception:
        # Without heartbeat the run loses its ownership after a while, which must be seen.
        logger.exception("the guard of run %s failed", run_id)
    finally:
        await runtime.close()


async def _owned(runtime: Runtime, run_id: str) -> list[Orchestration]:
    unfinished = await runtime.store.orchestrations(limit=10_000, unfinished_only=True)
    return [it for it in unfinished if it.owner is not None and it.owner.run_id == run_id]


def _beaten(orchestration: Orchestration, run_id: str) -> Orchestration:
    owner = orchestration.owner
    if owner is None or owner.run_id != run_id:
        return orchestration
    return orchestration.evolve(owner=owner.model_copy(update={"heartbeat": now()}))


async def _settle(home: Path | None, run_id: str) -> None:
    runtime = Runtime.open(home=home)
    try:
        settled = await settle_cancelled(runtime, run_id)
        logger.info("cancelled and cleaned up: %s", ", ".join(settled) or "nothing")
    finally:
        await runtime.close()
