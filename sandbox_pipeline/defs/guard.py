"""Stands by a run in its worker process, whichever executor runs the ops.

While the run lasts it keeps the ownership of the run's orchestrations alive and turns a cancel
asked for in the store into the interrupt that Dagster knows; the same interrupt ends a run that
lost its orchestration to another while it was silent. When the run is cancelled it ends
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
import time
from collections.abc import Generator
from pathlib import Path

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from sandbox_pipeline.errors import PipelineError, StoreError
from sandbox_pipeline.orchestrating import settle_cancelled
from sandbox_pipeline.ownership import HEARTBEAT_SECONDS, WORKER_VARIABLE, beaten
from sandbox_pipeline.records import Control, Orchestration, orchestration_key
from sandbox_pipeline.runtime import Runtime

logger = logging.getLogger(__name__)

CONTROL_POLL_SECONDS = 0.5
INTERACTIVE_TAG = "sandbox_pipeline/interactive"
"""On runs whose worker is a person's terminal, where an interrupt is a cancel."""


@contextlib.contextmanager
def guarded(instance: dg.DagsterInstance, run_id: str) -> Generator[None]:
    """Guard the run while the block runs, and settle it if it was cancelled."""
    home = instance_home(instance)
    guard = _Guard(instance, home, run_id)
    watcher = threading.Thread(target=lambda: asyncio.run(guard.watch()), name="run-guard")
    os.environ[WORKER_VARIABLE] = str(os.getpid())
    watcher.start()
    try:
        yield
    except BaseException:
        if not guard.lost:
            _ask_to_cancel_if_interactive(instance, run_id)
        raise
    finally:
        guard.over.set()
        watcher.join()
        os.environ.pop(WORKER_VARIABLE, None)
        if is_cancelled(instance, run_id):
            asyncio.run(_settle(home, run_id))
    if guard.cancelled or is_cancelled(instance, run_id):
        # Its forks obeyed before the interrupt came, and the ops came to their end in peace.
        _report_cancel(instance, run_id)
        raise DagsterExecutionInterruptedError


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


def _report_cancel(instance: dg.DagsterInstance, run_id: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is not None and not is_cancelled(instance, run_id):
        instance.report_run_canceling(run, message="Cancelled by command.")


class _Guard:
    """What the guard's thread does and has seen.

    Attributes:
        over: set when the run's ops have ended.
        lost: another run has taken an orchestration of this one over.
        cancelled: an orchestration of the run was cancelled in the store.
    """

    def __init__(self, instance: dg.DagsterInstance, home: Path | None, run_id: str) -> None:
        self._instance = instance
        self._home = home
        self._run_id = run_id
        self._interrupted = False
        self._last_beat = 0.0
        self._last_scan = 0.0
        self._mine: dict[str, Orchestration] = {}
        self._known: set[str] = set()
        self.over = threading.Event()
        self.lost = False
        self.cancelled = False

    async def watch(self) -> None:
        """Look after the run until it is over."""
        try:
            runtime = Runtime.open(home=self._home)
        except PipelineError as error:
            # The ops say the same, and where people look.
            logger.warning("run %s is not guarded: %s", self._run_id, error)
            return
        try:
            while not await asyncio.to_thread(self.over.wait, CONTROL_POLL_SECONDS):
                try:
                    await self._look(runtime)
                except StoreError as error:
                    # Without heartbeat the run loses its orchestration after a while.
                    logger.warning("the guard of run %s: %s", self._run_id, error)
            try:
                await self._look_back(runtime)
            except StoreError as error:
                logger.warning("the guard of run %s: %s", self._run_id, error)
        finally:
            await runtime.close()

    async def _unfinished(self, runtime: Runtime) -> dict[str, Orchestration]:
        """Unfinished orchestrations by key: mine, and now and then all, among which are new ones.

        With many runs at once, each reading those of all others at each look would be most of
        what the store does.
        """
        if self._mine and time.monotonic() - self._last_scan < HEARTBEAT_SECONDS:
            read = [await runtime.store.get(Orchestration, key) for key in self._mine]
            found = [it for it in read if it is not None and not it.complete]
        else:
            self._last_scan = time.monotonic()
            found = await runtime.store.orchestrations(limit=10_000, unfinished_only=True)
        return {it.key: it for it in found}

    async def _look(self, runtime: Runtime) -> None:
        unfinished = await self._unfinished(runtime)
        mine = {key: it for key, it in unfinished.items() if _owner_id(it) == self._run_id}
        for key in self._mine.keys() & unfinished.keys() - mine.keys():
            self.lost = True
            logger.error("run %s lost %s to %s", self._run_id, key, _owner_id(unfinished[key]))
        self._mine = mine
        self._known |= mine.keys()
        silent = runtime.settings.silent_seconds
        if time.monotonic() - self._last_beat > min(HEARTBEAT_SECONDS, silent / 4):
            self._last_beat = time.monotonic()
            for key in await self._alive(runtime):
                with contextlib.suppress(KeyError):
                    await runtime.store.update(
                        Orchestration, key, lambda it: beaten(it, self._run_id)
                    )
        self.cancelled |= any(it.control is Control.CANCEL for it in mine.values())
        if (self.cancelled or self.lost) and not self._interrupted:
            self._interrupted = True
            if self.cancelled:
                _report_cancel(self._instance, self._run_id)
            os.kill(os.getpid(), signal.SIGINT)

    async def _alive(self, runtime: Runtime) -> set[str]:
        """What needs a heartbeat: also beyond its end, for the sandboxes that publishing needs."""
        return self._known | {
            orchestration_key(lease.workflow_id)
            for lease in await runtime.store.leases()
            if lease.owner_run == self._run_id
        }

    async def _look_back(self, runtime: Runtime) -> None:
        """See a cancel that was carried out to its end between two looks."""
        for key in self._known:
            found = await runtime.store.get(Orchestration, key)
            if found is not None and _owner_id(found) == self._run_id:
                self.cancelled |= found.control is Control.CANCEL


def _owner_id(orchestration: Orchestration) -> str | None:
    return None if orchestration.owner is None else orchestration.owner.run_id


async def _settle(home: Path | None, run_id: str) -> None:
    runtime = Runtime.open(home=home)
    try:
        settled = await settle_cancelled(runtime, run_id)
        logger.info("cancelled and cleaned up: %s", ", ".join(settled) or "nothing")
    finally:
        await runtime.close()
