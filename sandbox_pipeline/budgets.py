"""What a fork, and the judge, may spend on the model, and what they have spent."""

from __future__ import annotations

from dataclasses import replace

from sandbox_pipeline.records import Fork, Orchestration
from sandbox_pipeline.store import Store
from sandbox_pipeline.store.spending import Claim

JUDGE = -1
"""The judge's number among the forks of an orchestration, where money is counted."""


def claim_of(
    orchestration: Orchestration, fork_num: int, deployment_daily_usd: float | None
) -> Claim | None:
    """What a fork has to have reserved before it starts; None where nothing is limited."""
    config = orchestration.config
    claim = Claim(
        workflow_id=orchestration.workflow_id,
        fork_num=fork_num,
        num_forks=config.num_forks,
        wanted_usd=config.agent.max_budget_usd,
        budget_usd=config.budget_usd,
        daily_budget_usd=_daily(orchestration, deployment_daily_usd),
    )
    return None if claim.budget_usd is None and claim.daily_budget_usd is None else claim


def judge_claim_of(
    orchestration: Orchestration, deployment_daily_usd: float | None
) -> Claim | None:
    """What the judge has to have reserved before it starts; None where nothing is limited."""
    claim = claim_of(orchestration, JUDGE, deployment_daily_usd)
    if claim is None:
        return None
    return replace(
        claim,
        num_forks=0,  # it comes after them: what is left is shared with none
        wanted_usd=orchestration.config.judge.max_budget_usd,
        limited_by="judge.max_budget_usd",
    )


def spent_usd(fork: Fork) -> float | None:
    """What a fork has spent so far, all its attempts together; None where that is unknown."""
    latest = fork.result.usage.cost_usd if fork.result is not None else None
    if latest is None:
        latest = fork.cost_so_far_usd
    if latest is None:
        return fork.earlier_cost_usd
    return latest + (fork.earlier_cost_usd or 0.0)


def limit_usd(orchestration: Orchestration, fork: Fork) -> float | None:
    """What the fork's present attempt may spend; None: no limit."""
    limits = [
        limit
        for limit in (fork.budget_usd, orchestration.config.agent.max_budget_usd)
        if limit is not None
    ]
    return max(0.0, min(limits) - (fork.earlier_cost_usd or 0.0)) if limits else None


async def settle(store: Store, fork: Fork) -> None:
    """Count what an ended fork spent, and give back what it didn't; safe to repeat."""
    spent = spent_usd(fork)
    if spent is None and fork.budget_usd is None:
        return
    await store.settle(
        fork.workflow_id,
        fork.fork_num,
        spent_usd=spent,
        agent_ran=fork.agent_started_at is not None,
    )


async def settle_judge(store: Store, orchestration: Orchestration) -> None:
    """Count what the judge spent, and give back what it didn't; safe to repeat."""
    judging = orchestration.judging
    if judging is None:
        return
    await store.settle(
        orchestration.workflow_id,
        JUDGE,
        spent_usd=judging.usage.cost_usd,
        agent_ran=bool(judging.sums),
    )


def _daily(orchestration: Orchestration, deployment_usd: float | None) -> float | None:
    limits = (orchestration.config.daily_budget_usd, deployment_usd)
    return min((limit for limit in limits if limit is not None), default=None)
