"""The asset checks see what they are there for, and the tags of a run say what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from sandbox_pipeline.clock import now
from sandbox_pipeline.config import OrchestrationConfig, parse_config
from sandbox_pipeline.defs.decision import cost_result, fork_results
from sandbox_pipeline.defs.presentation import asked_tags, outcome_tags
from sandbox_pipeline.orchestrating import Completed
from sandbox_pipeline.records import Fork, Lease
from tests.reports import fork, orchestration


def config(**changes: Any) -> OrchestrationConfig:
    return parse_config(
        {
            "prompt": "p",
            "num_forks": 2,
            "agent": {"command": "true", "max_budget_usd": 1},
            **changes,
        }
    )


def table(*rows: tuple[int, str, float | None]) -> pd.DataFrame:
    data = pd.DataFrame(rows, columns=["fork_num", "outcome", "cost_usd"])
    return data.astype({"cost_usd": "Float64"})


def results(
    forks: list[Fork], leases: list[Lease], data: pd.DataFrame, **changes: Any
) -> dict[str, bool]:
    found = fork_results(config(**changes), forks, leases, data)
    return {str(item.check_name): item.passed for item in found}


GOOD = table((0, "success", 0.1), (1, "failed", None))


def test_all_is_well() -> None:
    assert results([], [], GOOD) == {
        "every_planned_fork_present": True,
        "success_rate": True,
        "no_sandbox_leaked": True,
        "verification_untampered": True,
    }


def test_each_check_fails_for_its_own_reason(tmp_path: Path) -> None:
    def failed(**changes: Any) -> list[str]:
        given: dict[str, Any] = {"forks": [], "leases": [], "data": GOOD, **changes}
        return [name for name, passed in results(**given).items() if not passed]

    assert failed(data=table((0, "success", 0.1))) == ["every_planned_fork_present"]
    assert failed(data=table((0, "failed", 0.1), (1, "timeout", 0.1))) == ["success_rate"]
    assert failed(fail_run_below_success_rate=0.8) == ["success_rate"]
    lease = Lease(workflow_id="w", lease_id="l", fork_num=0, attempt=1, provider="local",
                  owner_run="r", intent_at=now())  # fmt: skip
    assert failed(leases=[lease]) == ["no_sandbox_leaked"]
    tampered = fork(tmp_path, 0)
    assert tampered.verification is not None
    changed = tampered.verification.model_copy(update={"restored": ("tests/test_x.py",)})
    assert failed(forks=[tampered.evolve(verification=changed)]) == ["verification_untampered"]


@pytest.mark.parametrize(
    ("costs", "changes", "passed"),
    [
        ((0.1, None), {}, True),
        ((None, None), {"budget_usd": 0.01}, True),
        ((1.2, 0.1), {}, False),
        ((0.6, 0.6), {"budget_usd": 1.0}, False),
        ((0.5, 0.5), {"budget_usd": 1.0}, True),
    ],
)
def test_cost_against_budget(
    costs: tuple[float | None, float | None], changes: dict[str, Any], passed: bool
) -> None:
    data = table((0, "success", costs[0]), (1, "success", costs[1]))
    found = cost_result(config(**changes), data)
    assert found.passed is passed
    assert ("cost_usd" in found.metadata) == any(cost is not None for cost in costs)


def test_the_judges_cost_counts_too() -> None:
    data = table((0, "success", 0.5), (1, "success", 0.4))
    assert cost_result(config(budget_usd=1.0), data).passed
    assert not cost_result(config(budget_usd=1.0), data, judge_cost_usd=0.2).passed


@pytest.mark.parametrize(
    ("summary", "outcome"),
    [
        ({"verified": 1, "succeeded": 1}, "verified"),
        ({"verified": 0, "succeeded": 2}, "all_succeeded"),
        ({"verified": 0, "succeeded": 1}, "some_succeeded"),
        ({"verified": 0, "succeeded": 0}, "none_succeeded"),
    ],
)
def test_tags_to_filter_runs_by(tmp_path: Path, summary: dict[str, int], outcome: str) -> None:
    made = orchestration(tmp_path, 2)
    assert asked_tags(made.config) == {
        "sandbox_pipeline/repo": "example.invalid/shop",
        "sandbox_pipeline/model": "sonnet",
        "sandbox_pipeline/agent": "command",
    }
    done = Completed(made, [], {"num_forks": 2, **summary}, None)
    assert outcome_tags(done) == {"sandbox_pipeline/outcome": outcome}
