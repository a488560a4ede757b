"""Orchestrations against each other: how often they succeed, what a success costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.metrics import judge_cost_usd, quantile, verdict_of
from sandbox_pipeline.records import Fork, Orchestration, Outcome, Verdict

MAX_REPO_CHARS = 80
Z_95 = 1.959963984540054


@dataclass(frozen=True)
class Compared:
    """One side of a comparison.

    Attributes:
        passed: verified forks; successful ones where nothing was verified (`by_verification`).
        low, high: 95% Wilson interval of the pass rate.
        cost_per_pass_usd: all that was spent, on the judge too; None where no fork's cost is known
            or nothing passed.
        forks_without_cost: whose cost is missing in it.
        seconds_p50: median of the agents' time.
    """

    name: str
    forks: int
    passed: int
    by_verification: bool
    low: float
    high: float
    cost_per_pass_usd: float | None
    forks_without_cost: int
    seconds_p50: float | None

    @property
    def rate(self) -> float:
        """Passed forks of all."""
        return self.passed / self.forks if self.forks else 0.0


def compared(name: str, parts: Sequence[tuple[Orchestration, Sequence[Fork]]]) -> Compared:
    """Sum up orchestrations that stand for one side."""
    by_verification = all(item.config.verify_command is not None for item, _ in parts)
    forks = [fork for _, listed in parts for fork in listed]
    passed = sum(
        verdict_of(fork) is Verdict.VERIFIED if by_verification else fork.outcome is Outcome.SUCCESS
        for fork in forks
    )
    costs = [
        fork.result.usage.cost_usd
        for fork in forks
        if fork.result and fork.result.usage.cost_usd is not None
    ]
    judged = sum(judge_cost_usd(item) or 0.0 for item, _ in parts)
    seconds = sorted(
        fork.timings.agent_seconds for fork in forks if fork.timings.agent_seconds is not None
    )
    low, high = wilson(passed, len(forks))
    return Compared(
        name=name,
        forks=len(forks),
        passed=passed,
        by_verification=by_verification,
        low=low,
        high=high,
        cost_per_pass_usd=(sum(costs) + judged) / passed if costs and passed else None,
        forks_without_cost=len(forks) - len(costs),
        seconds_p50=quantile(seconds, 0.5),
    )


def repo_name(config: OrchestrationConfig) -> str:
    """The repository, such as `github.com/you/project`; the end of a long one."""
    name = config.repo_url.rstrip("/").removesuffix(".git").split("://")[-1]
    return name[-MAX_REPO_CHARS:]


def wilson(passed: int, total: int) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion; everything where there is no try."""
    if total == 0:
        return 0.0, 1.0
    rate, square = passed / total, Z_95 * Z_95
    middle = (rate + square / (2 * total)) / (1 + square / total)
    half = (
        Z_95
        * math.sqrt(rate * (1 - rate) / total + square / (4 * total * total))
        / (1 + square / total)
    )
    return max(0.0, middle - half), min(1.0, middle + half)
