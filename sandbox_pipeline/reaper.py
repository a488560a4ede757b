"""Ends sandboxes that nobody owns any more. Idempotent; never touches one that is in use."""

from __future__ import annotations

import contextlib
import logging
import time
from dataclasses import dataclass

from sandbox_pipeline import leasing, plugins
from sandbox_pipeline.clock import now
from sandbox_pipeline.config import RetryConfig
from sandbox_pipeline.errors import ConfigError, OwnershipError, PipelineError, ProviderError
from sandbox_pipeline.orchestrating import cancel_now
from sandbox_pipeline.ownership import held_by, is_dead, unchanged_since
from sandbox_pipeline.preparation import discard_base
from sandbox_pipeline.records import (
    Control,
    Event,
    Fork,
    Lease,
    Orchestration,
    SandboxState,
    fork_key,
    orchestration_key,
)
from sandbox_pipeline.retrying import patiently
from sandbox_pipeline.runtime import APP, Runtime

logger = logging.getLogger(__name__)

# A sandbox whose lease is not in the store yet was created a moment ago, or its row is lost.
UNKNOWN_GRACE_SECONDS = 120.0
CANCELLED = "its orchestration was cancelled"
OVER = "its orchestration is over"
LEFT = "its orchestration was left by its run"


@dataclass(frozen=True)
class Reaped:
    """One sandbox that was ended, or would be."""

    provider: str
    sandbox_id: str
    workflow_id: str
    reason: str

    def __str__(self) -> str:
        return f"ended {self.provider} {self.sandbox_id}: {self.reason}"


async def reap(
    runtime: Runtime, *, dry_run: bool = False, ended_run: str | None = None
) -> list[Reaped]:
    """End what nobody owns: by the store's leases, and by each provider's own list.

    A sandbox is left alone while its orchestration's run is alive, and while the run is dead
    but the fork unfinished: a resume may still re-attach, and the time-to-live bounds that.
    An orchestration whose run died while it was being cancelled is cancelled to the end.

    Args:
        runtime: of this process.
        dry_run: only say what would be ended.
        ended_run: a Dagster run that is known to be over, whatever its worker looks like.
    """
    # First of all: what the agents of a cancelled orchestration did is kept before they end.
    reaped = [] if dry_run else await _finish_cancels(runtime)
    for lease in await runtime.store.leases():
        key = orchestration_key(lease.workflow_id)
        orchestration = await runtime.store.get(Orchestration, key)
        reason = await _why_not_needed(runtime, lease, orchestration, ended_run)
        if reason is None:
            continue
        if dry_run or await _end(runtime, lease, orchestration, reason):
            name = lease.sandbox_id or lease.lease_id
            reaped.append(Reaped(lease.provider, name, lease.workflow_id, reason))
    known = {item.sandbox_id for item in reaped}
    for name in plugins.names(plugins.PROVIDERS):
        reaped += [
            item
            for item in await _unleased(runtime, name, dry_run=dry_run)
            if item.sandbox_id not in known
        ]
    return reaped + await _left_snapshots(runtime, dry_run=dry_run)


async def ask_to_cancel(runtime: Runtime, run_id: str) -> None:
    """Remember that a run was cancelled, for its worker or, if that is dead, for `reap`."""
    for orchestration in await runtime.store.orchestrations(limit=10_000, unfinished_only=True):
        if orchestration.owner is not None and orchestration.owner.run_id == run_id:
            with contextlib.suppress(OwnershipError):
                await runtime.store.update(
                    Orchestration,
                    orchestration.key,
                    lambda it: it.evolve(control=Control.CANCEL),
                    fence=held_by(run_id),
                )


async def _finish_cancels(runtime: Runtime) -> list[Reaped]:
    ended: list[Reaped] = []
    for orchestration in await runtime.store.orchestrations(limit=10_000, unfinished_only=True):
        owner = orchestration.owner
        if orchestration.control is not Control.CANCEL or (
            owner is not None and not is_dead(owner)
        ):
            continue
        workflow_id = orchestration.workflow_id
        before = await runtime.store.leases(workflow_id)
        try:
            await cancel_now(runtime, orchestration)
        except (PipelineError, OSError) as error:
            logger.warning("could not cancel %s: %s", orchestration.key, error)
        left = {lease.lease_id for lease in await runtime.store.leases(workflow_id)}
        ended += [
            Reaped(lease.provider, lease.sandbox_id or lease.lease_id, workflow_id, CANCELLED)
            for lease in before
            if lease.lease_id not in left
        ]
    return ended


async def _left_snapshots(runtime: Runtime, *, dry_run: bool) -> list[Reaped]:
    """Prepared workspaces that no fork will need, or that nobody came back for.

    A dead run's is kept for as long as its sandboxes live on: a resume may want it.
    """
    reaped: list[Reaped] = []
    for it in await runtime.store.with_snapshots():
        if it.completed_at is not None:
            reason = OVER
        elif it.base_snapshot is None:
            reason = "it was replaced"
        elif it.owner is not None and is_dead(it.owner):
            silent_seconds = now().seconds_since(it.owner.heartbeat)
            if silent_seconds < it.config.sandbox.orphan_grace_seconds:
                continue
            reason = LEFT
        else:
            continue
        names = [name for name in (*it.stale_snapshots, it.base_snapshot) if name is not None]
        left: tuple[str, ...] = ()
        if not dry_run:
            try:
                left = (await discard_base(runtime, it, fence=unchanged_since(it))).stale_snapshots
            except OwnershipError as error:
                logger.info("left alone the snapshot of %s: %s", it.key, error)
                continue
        reaped += [
            Reaped(it.provider, name, it.workflow_id, reason) for name in names if name not in left
        ]
    return reaped


async def _why_not_needed(
    runtime: Runtime, lease: Lease, orchestration: Orchestration | None, ended_run: str | None
) -> str | None:
    if orchestration is None:
        return OVER
    if _is_owned(lease, orchestration, ended_run):
        return None
    if orchestration.completed_at is not None:
        return OVER
    if orchestration.control is Control.CANCEL:
        return CANCELLED
    if lease.fork_num is None:
        return LEFT
    return await _why_not_resumed(runtime, lease, lease.fork_num)


def _is_owned(lease: Lease, orchestration: Orchestration, ended_run: str | None) -> bool:
    """Whether a living run has a use for it; after the end, for publishing."""
    owner = orchestration.owner
    if owner is None or owner.run_id == ended_run or is_dead(owner):
        return False
    end = orchestration.completed_at
    return end is None or (
        lease.owner_run == owner.run_id and lease.intent_at.seconds_since(end) > 0
    )


async def _why_not_resumed(runtime: Runtime, lease: Lease, fork_num: int) -> str | None:
    fork = await runtime.store.get(Fork, fork_key(lease.workflow_id, fork_num))
    if fork is None or fork.outcome.is_terminal:
        return "its fork is over"
    if lease.state is not SandboxState.LIVE:
        return "it was being created or ended when its run died"
    return None


async def _end(runtime: Runtime, lease: Lease, seen: Orchestration | None, reason: str) -> bool:
    try:
        await leasing.end(
            runtime,
            lease,
            RetryConfig(),
            note=f"reaped: {reason}",
            fence=unchanged_since(seen),
        )
    except OwnershipError as error:
        logger.info("left alone %s: %s", lease.key, error)
        return False
    except (ProviderError, ConfigError) as error:
        logger.warning("could not end %s: %s", lease.key, error)
        return False
    key = orchestration_key(lease.workflow_id)
    payload = {"sandbox_id": lease.sandbox_id, "reason": reason}
    await runtime.store.append(
        Event(
            name="sandbox-reaped",
            workflow_id=lease.workflow_id,
            fork_num=lease.fork_num,
            time=time.time(),
            payload=payload,
        )
    )
    orchestration = await runtime.store.get(Orchestration, key)
    if orchestration is not None and orchestration.completed_at is not None:
        left = await runtime.store.leases(lease.workflow_id)
        if not left:
            await runtime.store.update(Orchestration, key, lambda it: it.evolve(complete=True))
    return True


async def _unleased(runtime: Runtime, name: str, *, dry_run: bool) -> list[Reaped]:
    """Sandboxes of this deployment that no live lease speaks of."""
    try:
        provider = runtime.provider(name)
    except ConfigError as error:
        logger.debug("provider %s is not configured: %s", name, error)
        return []
    retry = RetryConfig()
    wanted = {"app": APP, "deployment_id": await runtime.deployment_id()}
    try:
        found = await patiently(retry, lambda: provider.list(wanted))
    except ProviderError as error:
        # The other providers are looked after all the same.
        logger.warning("%s can't list its sandboxes: %s", name, error)
        return []
    # Read after the list: a lease is always older than its sandbox.
    leases = {lease.lease_id for lease in await runtime.store.leases()}
    reaped: list[Reaped] = []
    for info in found:
        if info.metadata.get("lease_id") in leases:
            continue
        age = now().wall - info.started_at if info.started_at is not None else None
        if age is not None and age < UNKNOWN_GRACE_SECONDS:
            continue
        reaped.append(
            Reaped(
                name, info.sandbox_id, info.metadata.get("workflow_id", ""), "no lease speaks of it"
            )
        )
        if not dry_run:
            try:
                await patiently(retry, lambda sandbox_id=info.sandbox_id: provider.kill(sandbox_id))
            except ProviderError as error:
                logger.warning("could not end %s: %s", info.sandbox_id, error)
                reaped.pop()
    return reaped
