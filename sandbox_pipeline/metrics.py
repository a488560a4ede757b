"""Forks into rows, rows into DataFrames with fixed columns and dtypes, rows into a summary."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from sandbox_pipeline.budgets import spent_usd
from sandbox_pipeline.records import Control, Fork, Orchestration, Outcome, Verdict

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]

_DTYPES: dict[type[sa.types.TypeEngine[Any]], str] = {
    sa.Integer: "Int64",
    sa.Float: "Float64",
    sa.Boolean: "boolean",
    sa.DateTime: "datetime64[us, UTC]",
    sa.String: "string",
    sa.Text: "string",
}


def dtypes(table: sa.Table) -> dict[str, str]:
    """Column to pandas dtype, in order; nullable, so that unknown is never 0."""
    return {column.name: _DTYPES[type(column.type)] for column in table.columns}


def frame(table: sa.Table, rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The rows as a DataFrame with exactly the table's columns and `dtypes`."""
    import pandas as pd

    columns: dict[str, Any] = {}
    for name, dtype in dtypes(table).items():
        values = [row.get(name) for row in rows]
        if dtype.startswith("datetime"):
            columns[name] = pd.to_datetime(pd.Series(values, dtype="object"), utc=True).astype(
                "datetime64[us, UTC]"
            )
        else:
            columns[name] = pd.array(values, dtype=dtype)  # pyright: ignore[reportCallIssue, reportArgumentType]
    return pd.DataFrame(columns)


def fork_row(fork: Fork, orchestration: Orchestration, folder: str) -> Row:
    """The row of one fork in `fork_metrics`.

    Args:
        fork: as stored.
        orchestration: it belongs to.
        folder: where its artifacts are.
    """
    result, patch, usage = fork.result, fork.patch, fork.result.usage if fork.result else None
    config = orchestration.config
    return {
        "workflow_id": fork.workflow_id,
        "fork_num": fork.fork_num,
        "run_id": fork.run_id,
        "provider": fork.provider or orchestration.provider,
        "sandbox_id": fork.sandbox_id,
        "agent": config.agent.kind,
        "agent_version": result and result.agent_version,
        "model": (result and result.model) or config.model,
        "outcome": fork.outcome.value,
        "failure_class": fork.failure_class and fork.failure_class.value,
        "message": fork.message,
        "base_commit": orchestration.base_commit,
        **{
            f"{stage}_attempts": fork.attempts.get(stage, 0)
            for stage in ("create", "health", "agent", "cleanup")
        },
        **fork.timings.model_dump(),
        "total_seconds": fork.total_seconds,
        "cpu_seconds": fork.used.cpu_seconds,
        "peak_memory_mb": _mebibytes(fork.used.peak_memory_bytes),
        "sandbox_cost_usd": _sandbox_cost(fork),
        "input_tokens": usage and usage.input_tokens,
        "output_tokens": usage and usage.output_tokens,
        "cache_creation_input_tokens": usage and usage.cache_creation_input_tokens,
        "cache_read_input_tokens": usage and usage.cache_read_input_tokens,
        "cost_usd": spent_usd(fork),
        "cost_basis": _cost_basis(fork),
        "turns": result and result.turns,
        "files_changed": patch and patch.files_changed,
        "insertions": patch and patch.insertions,
        "deletions": patch and patch.deletions,
        "patch_bytes": patch and patch.size_bytes,
        "patch_truncated": patch and patch.truncated,
        "output_truncated": result and result.output_truncated,
        "secret_leak": bool((result and result.secret_leak) or (patch and patch.secret_leak)),
        "exit_code": result and result.exit_code,
        **_verification(fork),
        "patch_path": patch and patch.path,
        "transcript_path": f"{folder}/transcript.jsonl" if result else None,
        "started_at": fork.started_at and fork.started_at.at,
        "ended_at": fork.ended_at and fork.ended_at.at,
    }


def verdict_of(fork: Fork) -> Verdict:
    """What is known of the fork's patch."""
    return fork.verification.outcome if fork.verification else Verdict.UNVERIFIED


@dataclass(frozen=True)
class Saving:
    """What `stop_after_verified` saved, estimated by the means of the forks that went on.

    Attributes:
        forks: that were cancelled.
        agent_seconds, cost_usd: None where no fork that went on has a figure.
    """

    forks: int
    agent_seconds: float | None
    cost_usd: float | None


def saving_of(orchestration: Orchestration, forks: Sequence[Fork]) -> Saving:
    """What was saved; nothing where the orchestration was not stopped early."""
    needed = orchestration.config.stop_after_verified
    verified = sum(verdict_of(fork) is Verdict.VERIFIED for fork in forks)
    if needed is None or verified < needed:
        return Saving(0, None, None)
    stopped = [
        fork for fork in forks if fork.outcome is Outcome.CANCELLED and fork.control is Control.RUN
    ]
    others = [fork for fork in forks if fork.outcome is not Outcome.CANCELLED]

    def saved(value: Callable[[Fork], float | None]) -> float | None:
        known = [figure for fork in others if (figure := value(fork)) is not None]
        if not known or not stopped:
            return None
        mean = sum(known) / len(known)
        return sum(max(0.0, mean - (value(fork) or 0.0)) for fork in stopped)

    return Saving(
        len(stopped),
        saved(lambda fork: fork.timings.agent_seconds),
        saved(lambda fork: fork.result.usage.cost_usd if fork.result else None),
    )


def _verification(fork: Fork) -> Row:
    found = fork.verification
    return {
        "verification": verdict_of(fork).value,
        "verify_reason": found and found.reason,
        "verify_seconds": found and found.seconds,
        "verify_exit_code": found and found.exit_code,
        "tests_passed": found and found.tests_passed,
        "tests_failed": found and found.tests_failed,
        "tests_skipped": found and found.tests_skipped,
        "protected_restored": found and len(found.restored),
        "verify_log_path": found and found.log_path,
    }


def summary_row(orchestration: Orchestration, forks: Sequence[Fork]) -> Row:
    """The row of one orchestration in `orchestration_summary`."""
    count = {outcome: sum(fork.outcome is outcome for fork in forks) for outcome in Outcome}
    costs = [cost for fork in forks if (cost := spent_usd(fork)) is not None]
    judge_cost = judge_cost_usd(orchestration)
    known = costs if judge_cost is None else [*costs, judge_cost]
    durations = sorted(fork.total_seconds for fork in forks if fork.total_seconds is not None)
    alive = sum(fork.timings.sandbox_seconds or 0.0 for fork in forks)
    working = sum(fork.timings.agent_seconds or 0.0 for fork in forks)
    saving = saving_of(orchestration, forks)
    verdicts = [verdict_of(fork) for fork in forks]
    done = orchestration.completed_at
    config = orchestration.config
    return {
        "workflow_id": orchestration.workflow_id,
        "run_id": orchestration.owner and orchestration.owner.run_id,
        "repo_url": config.repo_url,
        "branch": orchestration.branch,
        "base_commit": orchestration.base_commit,
        "provider": orchestration.provider,
        "agent": config.agent.kind,
        "model": config.model,
        "num_forks": config.num_forks,
        "succeeded": count[Outcome.SUCCESS],
        "failed": count[Outcome.FAILED],
        "timed_out": count[Outcome.TIMEOUT],
        "cancelled": count[Outcome.CANCELLED],
        "over_budget": count[Outcome.BUDGET_EXCEEDED],
        "success_rate": count[Outcome.SUCCESS] / config.num_forks,
        "verified": verdicts.count(Verdict.VERIFIED),
        "rejected": verdicts.count(Verdict.REJECTED),
        "stopped_early": saving.forks,
        "saved_agent_seconds": saving.agent_seconds,
        "saved_usd": saving.cost_usd,
        "cost_usd": sum(known) if known else None,
        "judge_cost_usd": judge_cost,
        "forks_without_cost": len(forks) - len(costs),
        "total_seconds_p50": quantile(durations, 0.5),
        "total_seconds_p95": quantile(durations, 0.95),
        "wall_seconds": done and done.seconds_since(orchestration.requested_at),
        "sandbox_seconds": alive,
        "paid_idle_seconds": max(0.0, alive - working),
        "requested_at": orchestration.requested_at.at,
        "completed_at": done and done.at,
    }


def judge_cost_usd(orchestration: Orchestration) -> float | None:
    """What the judge cost; None where there was none, it paid nothing, or that is unknown."""
    return orchestration.judging.usage.cost_usd if orchestration.judging is not None else None


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / 2**20


def _cost_basis(fork: Fork) -> str:
    if spent_usd(fork) is None:
        return "unknown"
    known = fork.result is not None and fork.result.usage.cost_usd is not None
    return fork.result.cost_basis if fork.result is not None and known else "computed"


def _sandbox_cost(fork: Fork) -> float | None:
    seconds, price = fork.timings.sandbox_seconds, fork.used.usd_per_second
    return None if seconds is None or price is None else seconds * price


def quantile(ordered: Sequence[float], q: float) -> float | None:
    """The q-quantile of sorted values, linear between neighbours; None of nothing."""
    if not ordered:
        return None
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)
