"""Ends sandboxes that nobody owns any more. Idempotent; never touches one that is in use."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from sandbox_pipeline import leasing, plugins
from sandbox_pipeline.clock import now
from sandbox_pipeline.config import RetryConfig
from sandbox_pipeline.errors import ConfigError, ProviderError
from sandbox_pipeline.ownership import is_dead
from sandbox_pipeline.records import (
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


@dataclass(frozen=True)
class Reaped:
    """One sandbox that was ended, or would be."""

    provider: str
    sandbox_id: str
    workflow_id: str
    reason: str


async def reap(runtime: Runtime, *, dry_run: bool = False) -> list[Reaped]:
    """End what nobody owns: by the store's leases, and by each provider's own list.

    A sandbox is left alone while its orchestration's run is alive, and while the run is dead
    but the fork unfinished: a resume may still re-attach, and the time-to-live bounds that.
    """
    reaped: list[Reaped] = []
    for lease in await runtime.store.leases():
        reason = await _why_not_needed(runtime, lease)
        if reason is not None:
            reaped.append(
                Reaped(
                    lease.provider, lease.sandbox_id or lease.lease_id, lease.workflow_id, reason
                )
            )
            if not dry_run:
                await _end(runtime, lease, reason)
    known = {item.sandbox_id for item in reaped}
    for name in plugins.names(plugins.PROVIDERS):
        reaped += [
            item
            for item in await _unleased(runtime, name, dry_run=dry_run)
            if item.sandbox_id not in known
        ]
    return reaped


async def _why_not_needed(runtime: Runtime, lease: Lease) -> str | None:
    orchestration = await runtime.store.get(Orchestration, orchestration_key(lease.workflow_id))
    if orchestration is None or orchestration.completed_at is not None:
        return "its orchestration is over"
    if orchestration.owner is not None and not is_dead(orchestration.owner):
        return None
    if lease.fork_num is None:
        return "the base of an orchestration that nobody works on"
    fork = await runtime.store.get(Fork, fork_key(lease.workflow_id, lease.fork_num))
    if fork is None or fork.outcome.is_terminal:
        return "its fork is over"
    if lease.state is not SandboxState.LIVE:
        return "it was being created or ended when its run died"
    return None


async def _end(runtime: Runtime, lease: Lease, reason: str) -> None:
    try:
        await leasing.end(runtime, lease, RetryConfig(), note=f"reaped: {reason}")
    except (ProviderError, ConfigError) as error:
        logger.warning("could not end %s: %s", lease.key, error)
        return
    key = orchestration_key(lease.workflow_id)
    orchestration = await runtime.store.get(Orchestration, key)
    if orchestration is not None and orchestration.completed_at is not None:
        left = await runtime.store.leases(lease.workflow_id)
        if not left:
            await runtime.store.update(Orchestration, key, lambda it: it.evolve(complete=True))


async def _unleased(runtime: Runtime, name: str, *, dry_run: bool) -> list[Reaped]:
    """Sandboxes of this deployment that no live lease speaks of."""
    try:
        provider = runtime.provider(name)
    except ConfigError as error:
        logger.debug("provider %s is not configured: %s", name, error)
        return []
    retry = RetryConfig()
    wanted = {"app": APP, "deployment_id": await runtime.deployment_id()}
    found = await patiently(retry, lambda: provider.list(wanted))
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
            await patiently(retry, lambda sandbox_id=info.sandbox_id: provider.kill(sandbox_id))
    return reaped
