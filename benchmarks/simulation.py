"""A day of many orchestrations, on virtual time, against a modelled provider.

Usage: python -m benchmarks.simulation [--scenario NAME …] [--part 1.0] [--json]

Real are the store with its transactions (SQLite in memory), the admission to `max_concurrent`,
the ledger of the rate limit, budgets, leases, retries and the reconciliation of lost answers.
Modelled are the provider, the agents (they only take time) and Dagster (a queue of runs).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy.engine import Connection, Engine

from benchmarks.modelled_provider import ModelledProvider, Plan
from benchmarks.virtual_time import run as run_on_virtual_time
from sandbox_pipeline import leasing
from sandbox_pipeline.budgets import claim_of
from sandbox_pipeline.clock import now
from sandbox_pipeline.config import OrchestrationConfig, parse_config
from sandbox_pipeline.errors import ProviderError
from sandbox_pipeline.ownership import claimed, held_by
from sandbox_pipeline.records import ForkRef, Orchestration
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.settings import Settings
from sandbox_pipeline.store import Store
from sandbox_pipeline.store.engine import open_engine
from sandbox_pipeline.testing import FakeAgent

T = TypeVar("T")

SLOT_POLL_SECONDS = 0.5
DAY_SECONDS = 86_400.0


@dataclass(frozen=True)
class Scenario:
    """What a day looks like.

    Attributes:
        forks: in the whole of `hours`.
        forks_each: of one orchestration.
        max_concurrent: sandboxes of one orchestration.
        runs: of Dagster at once; its queue holds the others back.
        agent_seconds: mean time of an agent at work; exponential.
        hours: over which the orchestrations are asked for, at random moments.
        starts_per_second: `rate_limit.starts`, with a window of one second.
        budget_usd: of one orchestration; None: no reservations.
    """

    name: str
    forks: int
    runs: int
    plan: Plan
    forks_each: int = 20
    max_concurrent: int = 4
    agent_seconds: float = 600.0
    hours: float = 24.0
    starts_per_second: int = 5
    budget_usd: float | None = None


PRO = Plan(concurrent=100, creates_per_second=5)
PRO_MORE = Plan(concurrent=1100, creates_per_second=5)
FREE = Plan(concurrent=20, creates_per_second=1)

HEADER = """\
| scenario | forks done | failed | hours | queue p50 / p99, s | 429 for rate / for concurrency \
| most creations in 1 s / limit | most alive / limit | utilisation | asks per permit |
|---|---|---|---|---|---|---|---|---|---|"""

SCENARIOS = [
    Scenario("10k", 10_000, runs=25, plan=PRO),
    Scenario("10k-wide", 10_000, runs=10, plan=PRO, max_concurrent=10),
    Scenario("10k-in-8h", 10_000, runs=25, plan=PRO, hours=8),
    Scenario("10k-no-queue", 10_000, runs=1000, plan=PRO, max_concurrent=10),
    Scenario("10k-free-plan", 10_000, runs=5, plan=FREE, starts_per_second=1),
    Scenario("100k", 100_000, runs=275, plan=PRO_MORE),
]


@dataclass
class Figures:
    """What came of it; seconds are virtual but for `real_seconds`."""

    scenario: str
    forks: int
    done: int = 0
    failed: int = 0
    hours_until_done: float = 0.0
    queue_p50_seconds: float = 0.0
    queue_p99_seconds: float = 0.0
    requests: int = 0
    refused_rate: int = 0
    refused_concurrent: int = 0
    most_in_a_second: int = 0
    most_alive: int = 0
    most_alive_of_one: int = 0
    limit: int = 0
    rate_limit: int = 0
    utilisation: float = 0.0
    left_alive: int = 0
    permit_asks_per_creation: float = 0.0
    real_seconds: float = 0.0
    failures: dict[str, int] = field(default_factory=dict[str, int])


class VirtualStore(Store):
    """The real store, without threads and by the loop's clock."""

    permit_asks = 0

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._connection = engine.connect()

    async def close(self) -> None:
        """See `Store.close`."""
        self._connection.close()
        await super().close()

    async def take_permit(self, scope: str, starts: int, window_ms: int) -> int | float:
        """See `Store.take_permit`."""
        self.permit_asks += 1
        return await super().take_permit(scope, starts, window_ms)

    def _now(self, connection: Connection) -> float:
        return self._monotonic()

    def _monotonic(self) -> float:
        return asyncio.get_running_loop().time()

    async def _run(
        self, work: Callable[[Connection], T], *, write: bool = True, short: bool = True
    ) -> T:
        del write, short
        with self._connection.begin():
            return work(self._connection)


class Simulation:
    """One scenario.

    Args:
        scenario: what to do.
        seed: of everything that is random.
    """

    def __init__(self, scenario: Scenario, seed: int = 1) -> None:
        self._scenario = scenario
        self._dice = random.Random(seed)  # noqa: S311 - a model, no secret
        self._provider = ModelledProvider(scenario.plan, self._dice)
        self._waits: list[float] = []
        self._config = _config(scenario)
        self.figures = Figures(
            scenario.name,
            scenario.forks,
            limit=scenario.plan.concurrent,
            rate_limit=scenario.plan.creates_per_second,
        )

    async def run(self) -> Figures:
        """The whole day, until the last fork is done."""
        began = time.monotonic()
        store = VirtualStore(open_engine("sqlite://"))
        scenario, figures = self._scenario, self.figures
        queue = asyncio.Semaphore(scenario.runs)
        count = scenario.forks // scenario.forks_each
        moments = sorted(self._dice.uniform(0, scenario.hours * 3600) for _ in range(count))
        async with asyncio.TaskGroup() as group:
            for number, moment in enumerate(moments):
                group.create_task(self._orchestration(store, queue, number, moment))
        ended = asyncio.get_running_loop().time()
        await self._provider.kill("")  # brings its clock up to now
        self._waits.sort()
        provider = self._provider
        figures.hours_until_done = ended / 3600
        figures.queue_p50_seconds = _percentile(self._waits, 0.5)
        figures.queue_p99_seconds = _percentile(self._waits, 0.99)
        figures.requests = provider.requests
        figures.refused_rate = provider.refused["rate"]
        figures.refused_concurrent = provider.refused["concurrent"]
        figures.most_in_a_second = provider.most_in_a_second
        figures.most_alive = provider.most_alive
        figures.most_alive_of_one = provider.most_alive_of_one
        figures.utilisation = provider.alive_seconds / (scenario.plan.concurrent * ended)
        figures.left_alive = provider.alive
        figures.permit_asks_per_creation = store.permit_asks / max(1, provider.requests)
        await store.close()
        figures.real_seconds = time.monotonic() - began
        return figures

    async def _orchestration(
        self, store: Store, queue: asyncio.Semaphore, number: int, moment: float
    ) -> None:
        await asyncio.sleep(moment)
        async with queue:
            runtime = Runtime(
                store,
                Settings.from_environ({}, home=Path("/nonexistent")),
                {},
                providers={"e2b": self._provider},
                agents={"fake": FakeAgent()},
            )
            wanted = Orchestration(
                workflow_id=f"w{number}",
                config=self._config,
                provider="e2b",
                network="none",
                artifacts="",
                requested_at=now(),
            )
            run_id = f"r{number}"
            await store.create_missing([wanted])
            orchestration = await store.update(
                Orchestration,
                wanted.key,
                lambda it: claimed(it, run_id, previous_ended=True),
            )
            async with asyncio.TaskGroup() as group:
                for fork_num in range(self._scenario.forks_each):
                    group.create_task(self._fork(runtime, orchestration, fork_num, moment))

    async def _fork(
        self, runtime: Runtime, orchestration: Orchestration, fork_num: int, asked_at: float
    ) -> None:
        """As `ForkLife` does it, without what happens inside of the sandbox."""
        ref = ForkRef(workflow_id=orchestration.workflow_id, fork_num=fork_num)
        limit = orchestration.config.max_concurrent
        run_id = orchestration.owner.run_id if orchestration.owner else ""
        await runtime.slots.take(ref, limit)
        claim = claim_of(orchestration, fork_num, None)
        wanted = leasing.new_lease(orchestration, run_id, fork_num=fork_num, attempt=1)
        while True:
            lease = None
            if claim is None or await runtime.store.reserve(claim) is not None:
                lease = await runtime.store.admit(wanted, limit, fence=held_by(run_id))
            if lease is not None:
                break
            await asyncio.sleep(SLOT_POLL_SECONDS)
        figures = self.figures
        permit = await leasing.wait_for_permit(runtime, orchestration)
        self._waits.append(asyncio.get_running_loop().time() - asked_at)
        try:
            await self._worked(runtime, orchestration, lease, permit)
            figures.done += 1
        except ProviderError as error:
            figures.failed += 1
            kind = error.policy.failure_class.value
            figures.failures[kind] = figures.failures.get(kind, 0) + 1
        if claim is not None:
            await runtime.store.settle(ref.workflow_id, fork_num, spent_usd=0.1, agent_ran=True)
        runtime.slots.give_back(ref)

    async def _worked(
        self, runtime: Runtime, orchestration: Orchestration, lease: Any, permit: int
    ) -> None:
        attempts = iter(range(1, 1000))

        async def before_attempt() -> int:
            return next(attempts)

        async def after_failure(attempt: int, error: ProviderError) -> None:
            return

        created = await leasing.create(
            runtime,
            orchestration,
            lease,
            permit=permit,
            network="none",
            base=None,
            before_attempt=before_attempt,
            after_failure=after_failure,
        )
        await asyncio.sleep(self._dice.expovariate(1 / self._scenario.agent_seconds))
        await leasing.end(runtime, created.lease, orchestration.config.retry, note="done")


def _config(scenario: Scenario) -> OrchestrationConfig:
    fields: Mapping[str, Any] = {
        "repo_url": "https://example.invalid/r.git",
        "prompt": "p",
        "num_forks": scenario.forks_each,
        "max_concurrent": scenario.max_concurrent,
        "agent": {"kind": "fake"},
        "sandbox": {"provider": "e2b"},
        "rate_limit": {"starts": scenario.starts_per_second, "window_ms": 1000},
        "budget_usd": scenario.budget_usd,
    }
    return parse_config(dict(fields))


def _percentile(values: list[float], share: float) -> float:
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0.0


def simulate(scenario: Scenario, seed: int = 1) -> Figures:
    """Run a scenario to its end."""
    return run_on_virtual_time(Simulation(scenario, seed).run())


def main() -> int:
    """Run the scenarios and print what came of them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenario", choices=names, nargs="*", default=names)
    parser.add_argument("--part", type=float, default=1.0, help="of the day, at its rates")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    rows: list[Figures] = []
    if not chosen.json:
        print(HEADER, flush=True)
    for scenario in SCENARIOS:
        if scenario.name not in chosen.scenario:
            continue
        part = replace(
            scenario,
            forks=int(scenario.forks * chosen.part),
            hours=scenario.hours * chosen.part,
        )
        rows.append(simulate(part))
        if not chosen.json:
            print(_line(rows[-1]), flush=True)
    if chosen.json:
        print(json.dumps([asdict(row) for row in rows]))
    return 0


def _line(row: Figures) -> str:
    return (
        f"| {row.scenario} | {row.done} | {row.failed} | {row.hours_until_done:.1f} "
        f"| {row.queue_p50_seconds:.1f} / {row.queue_p99_seconds:.0f} "
        f"| {row.refused_rate} / {row.refused_concurrent} "
        f"| {row.most_in_a_second} / {row.rate_limit} | {row.most_alive} / {row.limit} "
        f"| {row.utilisation:.0%} | {row.permit_asks_per_creation:.1f} |"
    )


if __name__ == "__main__":
    sys.exit(main())
