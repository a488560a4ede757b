"""Which run works on an orchestration; never two at once.

A run that lost its orchestration to another, because it was silent for too long, may still have
writes on their way. They carry a fence, which the store checks in the same transaction.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_pipeline.clock import boot_id, now
from sandbox_pipeline.errors import OwnershipError
from sandbox_pipeline.records import Orchestration, Owner
from sandbox_pipeline.store.statements import Fence

HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0
WORKER_VARIABLE = "SANDBOX_PIPELINE_RUN_WORKER"
"""Set by a run's worker for the processes of its steps: its own id."""


def claimed(
    orchestration: Orchestration,
    run_id: str,
    *,
    previous_ended: bool,
    silent_seconds: float = SILENT_SECONDS,
) -> Orchestration:
    """The orchestration owned by this run.

    Args:
        orchestration: as stored.
        run_id: of this run.
        previous_ended: the orchestrator knows that the present owner's run is over.
        silent_seconds: without a heartbeat for so long this run counts as dead.

    Raises:
        OwnershipError: another run owns it and is alive; it is named.
    """
    owner = orchestration.owner
    if owner is not None and owner.run_id != run_id and not previous_ended and not is_dead(owner):
        msg = (
            f"workflow_id: {orchestration.workflow_id!r} is being worked on by run {owner.run_id}; "
            "wait for it, cancel it, or choose another workflow_id"
        )
        raise OwnershipError(msg)
    mine = _alive_here(
        run_id, 1 if owner is None else owner.epoch + 1, silent_seconds=silent_seconds
    )
    return orchestration.evolve(owner=mine)


def beaten(orchestration: Orchestration, run_id: str) -> Orchestration:
    """The orchestration with a sign of life of its run, if it is still this one.

    The process that gives the sign is the one whose death would be the run's: an op that claimed
    the orchestration may have run elsewhere, on a Celery worker or in a pod.
    """
    owner = orchestration.owner
    if owner is None or owner.run_id != run_id:
        return orchestration
    mine = _alive_here(run_id, owner.epoch, silent_seconds=owner.silent_seconds)
    return orchestration.evolve(owner=mine)


def on_another_machine(orchestration: Orchestration) -> bool:
    """Whether this process is known to be on another machine than the owner's."""
    owner, here = orchestration.owner, boot_id()
    return owner is not None and bool(owner.boot and here) and owner.boot.split()[0] != here


def _worker_pid() -> int:
    return int(os.environ.get(WORKER_VARIABLE) or os.getpid())


def _alive_here(run_id: str, epoch: int, *, silent_seconds: float) -> Owner:
    pid = _worker_pid()
    return Owner(
        run_id=run_id,
        epoch=epoch,
        pid=pid,
        boot=_pid_space(),
        pid_started=process_started(pid) or "",
        heartbeat=now(),
        silent_seconds=silent_seconds,
    )


def is_dead(owner: Owner) -> bool:
    """Whether the owner's worker is known to be dead, or was silent for too long."""
    if (
        owner.boot
        and owner.boot == _pid_space()
        and process_started(owner.pid) != owner.pid_started
    ):
        return True
    return now().seconds_since(owner.heartbeat) > owner.silent_seconds


def left_by_its_run(orchestration: Orchestration) -> bool:
    """Whether this process works for a run whose own worker, another process, is dead."""
    owner = orchestration.owner
    if owner is None or (owner.boot == _pid_space() and owner.pid == _worker_pid()):
        return False
    return is_dead(owner)


def held_by(run_id: str) -> Fence:
    """A fence that lets writes pass while this run owns the orchestration."""

    def check(orchestration: Orchestration | None) -> None:
        owner = orchestration.owner if orchestration is not None else None
        if owner is None or owner.run_id != run_id:
            by = "nobody" if owner is None else f"run {owner.run_id}"
            msg = f"run {run_id} lost the orchestration, which is now owned by {by}"
            raise OwnershipError(msg)

    return check


def unchanged_since(seen: Orchestration | None) -> Fence:
    """A fence that lets writes pass while the owner is the one that was seen."""
    epoch = _epoch(seen)

    def check(orchestration: Orchestration | None) -> None:
        if _epoch(orchestration) != epoch:
            msg = "a run has taken the orchestration over meanwhile"
            raise OwnershipError(msg)

    return check


def process_started(pid: int) -> str | None:
    """When a process of this machine was started, in clock ticks; None if it is no more.

    A zombie counts as no more. Where the system doesn't tell, the empty string.
    """
    if not Path("/proc/self/stat").exists():
        return ""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in "ZX" else fields[19]


def _epoch(orchestration: Orchestration | None) -> int:
    return 0 if orchestration is None or orchestration.owner is None else orchestration.owner.epoch


def _pid_space() -> str:
    """Where process ids mean the same: one boot of one machine, and there one container."""
    boot = boot_id()
    try:
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}" if boot else ""
    except OSError:
        return ""
