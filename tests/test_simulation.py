"""A simulated day keeps its limits: real store, permits, budgets and retries on virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from benchmarks.modelled_provider import Plan
from benchmarks.simulation import Scenario, simulate
from benchmarks.virtual_time import run

CALM = Scenario(
    "calm", 60, runs=3, plan=Plan(concurrent=12, creates_per_second=2), forks_each=10,
    max_concurrent=4, agent_seconds=120.0, hours=0.2, starts_per_second=2,
)  # fmt: skip


def test_neither_the_plans_rate_nor_its_concurrency_is_ever_exceeded() -> None:
    seen = simulate(CALM)
    assert (seen.done, seen.failed) == (60, 0)
    assert seen.refused_rate == seen.refused_concurrent == 0
    assert seen.most_in_a_second <= 2
    assert seen.most_alive_of_one <= 4
    assert seen.most_alive <= 12
    assert seen.left_alive == 0
    assert 0 < seen.utilisation <= 1


def test_slow_answers_and_lost_ones_break_no_limit_and_leave_nothing() -> None:
    plan = replace(CALM.plan, latency_seconds=3.0, latency_sigma=1.0, failure_rate=0.2)
    seen = simulate(replace(CALM, plan=plan))
    assert seen.done + seen.failed == 60
    assert seen.failed < 10
    assert seen.requests > 60, "some were tried again"
    assert seen.refused_rate == 0
    assert seen.most_in_a_second <= 2
    assert seen.most_alive_of_one <= 4
    assert seen.left_alive == 0


def test_more_runs_than_the_plan_has_sandboxes_for_are_refused_and_it_shows() -> None:
    """What the limit of runs in docs/scaling.md is for."""
    plan = Plan(concurrent=4, creates_per_second=2)
    seen = simulate(replace(CALM, forks=30, runs=100, hours=0.01, plan=plan))
    assert seen.refused_concurrent > 0
    assert seen.failures.keys() == {"rate_limited"}
    assert seen.most_alive <= 4
    assert seen.left_alive == 0


def test_every_fork_gets_its_turn_where_the_budget_is_reserved_in_parts() -> None:
    seen = simulate(replace(CALM, forks=20, budget_usd=10.0))
    assert (seen.done, seen.failed) == (20, 0)


def test_the_same_seed_gives_the_same_day() -> None:
    first, second = simulate(CALM, seed=7), simulate(CALM, seed=7)
    assert replace(first, real_seconds=0.0) == replace(second, real_seconds=0.0)


def test_virtual_time_passes_without_waiting_and_tells_of_a_deadlock() -> None:
    async def a_day() -> float:
        await asyncio.sleep(86_400)
        return asyncio.get_running_loop().time()

    async def never() -> None:
        await asyncio.get_running_loop().create_future()

    assert run(a_day()) == pytest.approx(86_400)
    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        run(never())
