"""One orchestration: begun or resumed, completed with a row for every planned fork, settled."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_pipeline import judging, leasing, metrics, plugins, preparation, publishing
from sandbox_pipeline.budgets import settle, settle_judge
from sandbox_pipeline.clock import now
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import (
    AgentError,
    ConfigError,
    FailureClass,
    ProviderError,
)
from sandbox_pipeline.journal import artifacts_of
from sandbox_pipeline.ownership import claimed, held_by, unchanged_since
from sandbox_pipeline.records import (
    Control,
    Event,
    Failure,
    Fork,
    ForkRef,
    Lease,
    Metrics,
    Orchestration,
    Outcome,
    SandboxState,
    Stage,
    fork_key,
    metrics_key,
    orchestration_key,
)
from sandbox_pipeline.redaction import MIN_SECRET_LENGTH, SECRET_VARIABLES, Redactor
from sandbox_pipeline.runtime import Announce, Runtime, silent
from sandbox_pipeline.salvaging import salvage
from sandbox_pipeline.store import tables
from sandbox_pipeline.store.statements import Fence

logger = logging.getLogger(__name__)

_IDENTITY = ("repo_url", "branch", "prompt", "num_forks", "model", "setup_command")


@dataclass(frozen=True)
class Completed:
    """What came of an orchestration.

    Attributes:
        rows: of `fork_metrics`, one a planned fork, by number.
        summary: the row of `orchestration_summary`.
        error: why the Dagster run must fail nevertheless, or None.
    """

    orchestration: Orchestration
    rows: list[metrics.Row]
    summary: metrics.Row
    error: str | None


def validate(runtime: Runtime, config: OrchestrationConfig) -> None:
    """Check all that can be known before anything is created.

    Raises:
        ConfigError: naming the field or the environment variable and the remedy.
    """
    refuse_secrets(config, runtime.environ)
    agent = runtime.agent(config.agent.kind)
    provider = plugins.resolve_provider(config, runtime.environ)
    agent.validate(config.agent, runtime.environ, provider=provider)
    runtime.provider(provider)
    source = preparation.check_repository(config, runtime.settings.home)
    publishing.check(config, source, runtime.environ)
    judging.check(runtime, config)


def refuse_secrets(config: OrchestrationConfig, environ: Mapping[str, str]) -> None:
    """Refuse a configuration that holds a secret, also encoded: it would be stored as it is.

    Raises:
        ConfigError: naming the variable, not the value.
    """
    text = config.model_dump_json()
    for name in (*SECRET_VARIABLES, *config.agent.env_from):
        value = environ.get(name, "").strip()
        plain = len(value) >= MIN_SECRET_LENGTH and json.dumps(value)[1:-1] in text
        if plain or Redactor([value]).clean(text.encode())[1]:
            msg = (
                f"configuration: holds the value of {name}, and would be stored and shown with it; "
                "name the variable in agent.env_from instead"
            )
            raise ConfigError(msg)


async def begin(
    runtime: Runtime,
    config: OrchestrationConfig,
    workflow_id: str,
    run_id: str,
    *,
    previous_ended: bool = False,
    announce: Announce = silent,
) -> list[ForkRef]:
    """Start an orchestration, or take up an unfinished one of the same name.

    Args:
        runtime: of this process.
        config: what was asked for.
        workflow_id: its name.
        run_id: the Dagster run that works on it now.
        previous_ended: the run that owned it is known to be over.
        announce: shows events where people watch.

    Returns:
        All planned forks; those that are done already pass through their stages untouched.

    Raises:
        ConfigError: it can't be run as configured.
        OwnershipError: another run works on it.
        GitError: the repository can't be fetched now.
    """
    validate(runtime, config)
    orchestration = await _open(runtime, config, workflow_id)
    orchestration = await runtime.store.update(
        Orchestration,
        orchestration.key,
        lambda it: claimed(
            it,
            run_id,
            previous_ended=previous_ended,
            silent_seconds=runtime.settings.silent_seconds,
        ),
    )
    if not orchestration.complete:
        orchestration = await preparation.pin_base(runtime, orchestration)
    forks = [Fork(workflow_id=workflow_id, fork_num=n) for n in range(config.num_forks)]
    await runtime.store.create_missing(forks)
    done = sum(fork.outcome.is_terminal for fork in await runtime.store.forks(workflow_id))
    event = _event(
        "orchestration-requested",
        workflow_id,
        run_id=run_id,
        num_forks=config.num_forks,
        already_done=done,
        provider=orchestration.provider,
        base_commit=orchestration.base_commit,
        artifacts=orchestration.artifacts,
    )
    await runtime.store.append(event)
    announce(event)
    if done < config.num_forks:
        await _prepare(runtime, orchestration, run_id)
    return [ForkRef(workflow_id=workflow_id, fork_num=n) for n in range(config.num_forks)]


async def complete(
    runtime: Runtime, workflow_id: str, run_id: str, announce: Announce = silent
) -> Completed:
    """Close an orchestration: one row for every planned fork, also for one that got lost."""
    store = runtime.store
    orchestration = await store.need(Orchestration, orchestration_key(workflow_id))
    fence = held_by(run_id)
    fence(orchestration)
    lost = await _mark_unfinished(
        runtime,
        orchestration,
        Outcome.FAILED,
        "the fork never reached its end in this run",
        failure_class=FailureClass.LOST,
        fence=fence,
    )
    alive = await _end_all(runtime, orchestration, note="orchestration ended", fence=fence)
    orchestration = await preparation.discard_base(runtime, orchestration)
    orchestration = await judging.judge(runtime, orchestration, run_id, announce)
    if not orchestration.complete:
        orchestration = await store.update(
            Orchestration,
            orchestration.key,
            lambda it: it.evolve(complete=alive == 0, completed_at=now()),
            fence=fence,
        )
    forks = await store.forks(workflow_id)
    rows, summary = await write_metrics(runtime, orchestration, forks)
    event = _completed_event(summary, alive)
    await store.append(event)
    announce(event)
    return Completed(orchestration, rows, summary, _run_error(orchestration, summary, lost))


async def write_metrics(
    runtime: Runtime, orchestration: Orchestration, forks: Sequence[Fork]
) -> tuple[list[metrics.Row], metrics.Row]:
    """Store the rows of both metrics tables anew; safe to repeat."""
    store = runtime.store
    rows = [
        metrics.fork_row(fork, orchestration, str(artifacts_of(orchestration, fork)))
        for fork in forks
    ]
    summary = metrics.summary_row(orchestration, forks)
    await store.write_rows(tables.fork_metrics, orchestration.workflow_id, rows)
    await store.write_rows(tables.orchestration_summary, orchestration.workflow_id, [summary])
    plain: dict[str, Any] = {
        name: value.isoformat() if hasattr(value, "isoformat") else value
        for name, value in summary.items()
    }
    await store.create_missing([Metrics(workflow_id=orchestration.workflow_id, summary={})])
    key = metrics_key(orchestration.workflow_id)
    await store.update(Metrics, key, lambda it: it.evolve(summary=plain))
    return rows, summary


async def settle_cancelled(runtime: Runtime, run_id: str) -> list[str]:
    """After a cancel: end all sandboxes of the run's orchestrations, mark the rest cancelled.

    Covers forks that were between two ops, where no op could have cleaned up.

    Returns:
        The orchestrations that were settled.
    """
    settled: list[str] = []
    for orchestration in await runtime.store.orchestrations(limit=10_000, unfinished_only=True):
        if orchestration.owner is not None and orchestration.owner.run_id == run_id:
            await cancel_now(runtime, orchestration)
            settled.append(orchestration.workflow_id)
    return settled


async def cancel_now(runtime: Runtime, orchestration: Orchestration) -> None:
    """End an orchestration that no worker works on any more; what its agents did is kept.

    Raises:
        OwnershipError: a run has taken it over meanwhile, and will see the cancel itself.
    """
    fence = unchanged_since(orchestration)
    orchestration = await runtime.store.update(
        Orchestration, orchestration.key, lambda it: it.evolve(control=Control.CANCEL)
    )
    await salvage(runtime, orchestration)
    await _mark_unfinished(runtime, orchestration, Outcome.CANCELLED, "cancelled", fence=fence)
    await settle_judge(runtime.store, orchestration)
    alive = await _end_all(runtime, orchestration, note="cancelled", fence=fence)
    orchestration = await preparation.discard_base(runtime, orchestration)
    orchestration = await runtime.store.update(
        Orchestration,
        orchestration.key,
        lambda it: it.evolve(complete=alive == 0, completed_at=it.completed_at or now()),
        fence=fence,
    )
    _, summary = await write_metrics(
        runtime, orchestration, await runtime.store.forks(orchestration.workflow_id)
    )
    await runtime.store.append(_completed_event(summary, alive))


async def _open(runtime: Runtime, config: OrchestrationConfig, workflow_id: str) -> Orchestration:
    key = orchestration_key(workflow_id)
    existing = await runtime.store.get(Orchestration, key)
    if existing is None:
        agent = runtime.agent(config.agent.kind)
        new = Orchestration(
            workflow_id=workflow_id,
            config=config,
            provider=plugins.resolve_provider(config, runtime.environ),
            network=plugins.resolve_network(config, agent),
            artifacts=str(_artifacts_root(runtime, config) / workflow_id),
            requested_at=now(),
        )
        await runtime.store.create_missing([new])
        return await runtime.store.need(Orchestration, key)
    differing = [
        name for name in _IDENTITY if getattr(existing.config, name) != getattr(config, name)
    ]
    if existing.config.agent.kind != config.agent.kind:
        differing.append("agent.kind")
    if differing:
        msg = (
            f"workflow_id: {workflow_id!r} exists with another {', '.join(differing)}; choose "
            "another workflow_id, or give the same values to resume it"
        )
        raise ConfigError(msg)
    return existing


def _artifacts_root(runtime: Runtime, config: OrchestrationConfig) -> Path:
    if config.artifacts_dir is None:
        return runtime.settings.artifacts
    return Path(config.artifacts_dir).expanduser().absolute()


async def _prepare(runtime: Runtime, orchestration: Orchestration, run_id: str) -> None:
    try:
        await preparation.prepare(runtime, orchestration, run_id)
    except (AgentError, ProviderError) as error:
        failure_class = (
            error.failure_class if isinstance(error, AgentError) else error.policy.failure_class
        )
        text = runtime.redactor(orchestration).text(str(error))
        failure = Failure(failure_class=failure_class, message=text)
        await runtime.store.update(
            Orchestration,
            orchestration.key,
            lambda it: it.evolve(fatal=failure),
            fence=held_by(run_id),
        )


async def _mark_unfinished(
    runtime: Runtime,
    orchestration: Orchestration,
    outcome: Outcome,
    message: str,
    *,
    failure_class: FailureClass | None = None,
    fence: Fence,
) -> int:
    count = 0
    for fork in await runtime.store.forks(orchestration.workflow_id):
        if fork.ended_at is not None and fork.outcome.is_terminal:
            continue

        def ended(it: Fork) -> Fork:
            changes: dict[str, Any] = {"stage": Stage.DONE, "ended_at": it.ended_at or now()}
            if not it.outcome.is_terminal:
                changes |= {"outcome": outcome, "failure_class": failure_class, "message": message}
            if it.total_seconds is None and it.started_at is not None:
                changes["total_seconds"] = now().seconds_since(it.started_at)
            if it.agent_started_at is not None and it.timings.agent_seconds is None:
                worked = now().seconds_since(it.agent_started_at)
                changes["timings"] = it.timings.model_copy(update={"agent_seconds": worked})
            return it.evolve(**changes)

        count += not fork.outcome.is_terminal
        final = outcome if not fork.outcome.is_terminal else fork.outcome
        event = _event("fork-ended", fork.workflow_id, fork.fork_num, outcome=final.value)
        changed = await runtime.store.update(Fork, fork.key, ended, [event], fence=fence)
        await settle(runtime.store, changed)
    return count


async def _end_all(
    runtime: Runtime, orchestration: Orchestration, *, note: str, fence: Fence
) -> int:
    """End every sandbox that may still be there; how many could not be ended."""
    leases = await runtime.store.leases(orchestration.workflow_id)

    async def end_one(lease: Lease) -> bool:
        try:
            retry = orchestration.config.retry
            gone = await leasing.end(runtime, lease, retry, note=note, fence=fence)
        except ProviderError as error:
            logger.warning("sandbox %s left to the reaper: %s", lease.key, error)
            return False
        await runtime.store.append(
            _event(
                "sandbox-cleaned",
                lease.workflow_id,
                lease.fork_num,
                ok=True,
                sandbox_id=lease.sandbox_id,
                reason=note,
            )
        )
        if lease.fork_num is not None and lease.live_at and gone.gone_at:
            await _add_sandbox_seconds(runtime, lease, gone.gone_at.seconds_since(lease.live_at))
        return True

    results = await asyncio.gather(*(end_one(lease) for lease in leases))
    return results.count(False)


async def _add_sandbox_seconds(runtime: Runtime, lease: Lease, seconds: float) -> None:
    def add(fork: Fork) -> Fork:
        total = (fork.timings.sandbox_seconds or 0.0) + seconds
        return fork.evolve(
            sandbox_state=SandboxState.GONE,
            timings=fork.timings.model_copy(update={"sandbox_seconds": total}),
        )

    await runtime.store.update(Fork, fork_key(lease.workflow_id, lease.fork_num or 0), add)


def _completed_event(summary: metrics.Row, alive: int) -> Event:
    names = ("num_forks", "succeeded", "failed", "timed_out", "cancelled", "cost_usd")
    return _event(
        "orchestration-completed",
        str(summary["workflow_id"]),
        **{name: summary[name] for name in names},
        sandboxes_alive=alive,
    )


def _event(name: str, workflow_id: str, fork_num: int | None = None, **payload: Any) -> Event:
    return Event(
        name=name, workflow_id=workflow_id, fork_num=fork_num, time=time.time(), payload=payload
    )


def _run_error(orchestration: Orchestration, summary: metrics.Row, lost: int) -> str | None:
    if orchestration.fatal is not None:
        return f"{orchestration.fatal.failure_class}: {orchestration.fatal.message}"
    if lost:
        return f"{lost} of {summary['num_forks']} forks got lost: Dagster never ran their ops"
    least = orchestration.config.fail_run_below_success_rate
    if least is not None and not summary["stopped_early"] and summary["success_rate"] < least:
        return (
            f"success rate {summary['success_rate']:.0%} is below "
            f"fail_run_below_success_rate ({least:.0%})"
        )
    return None
