"""Which run works on an orchestration; never two at once."""

from __future__ import annotations

import os
from pathlib import Path

from sandbox_pipeline.clock import boot_id, now
from sandbox_pipeline.errors import OwnershipError
from sandbox_pipeline.records import Orchestration, Owner

HEARTBEAT_SECONDS = 5.0
SILENT_SECONDS = 60.0


def claimed(orchestration: Orchestration, run_id: str, *, previous_ended: bool) -> Orchestration:
    """The orchestration owned by this run.

    Args:
        orchestration: as stored.
        run_id: of this run.
        previous_ended: the orchestrator knows that the present owner's run is over.

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
    pid = os.getpid()
    mine = Owner(
        run_id=run_id,
        epoch=1 if owner is None else owner.epoch + 1,
        pid=pid,
        boot=boot_id(),
        pid_started=process_started(pid) or "",
        heartbeat=now(),
    )
    return orchestration.evolve(owner=mine)


def is_dead(owner: Owner) -> bool:
    """Whether the owner's worker is known to be dead, or was silent for `SILENT_SECONDS`."""
    if owner.boot and owner.boot == boot_id() and process_started(owner.pid) != owner.pid_started:
        return True
    return now().seconds_since(owner.heartbeat) > SILENT_SECONDS


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
