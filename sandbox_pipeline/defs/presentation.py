"""Results as Dagster's metadata: a table to read, numbers that become trends, links."""

from __future__ import annotations

from pathlib import Path

import dagster as dg

from sandbox_pipeline.comparison import repo_name
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.metrics import Row
from sandbox_pipeline.orchestrating import Completed

Metadata = dict[str, dg.MetadataValue]
GROUP = "sandbox_pipeline"
"""Of the assets, in Dagster's catalog."""

_COLUMNS = (
    "fork_num",
    "outcome",
    "failure_class",
    "verification",
    "message",
    "queue_seconds",
    "create_seconds",
    "agent_seconds",
    "total_seconds",
    "turns",
    "output_tokens",
    "cost_usd",
    "files_changed",
    "insertions",
    "deletions",
    "exit_code",
)
_NUMBERS = (
    "num_forks",
    "succeeded",
    "failed",
    "timed_out",
    "cancelled",
    "over_budget",
    "success_rate",
    "verified",
    "rejected",
    "stopped_early",
    "saved_agent_seconds",
    "saved_usd",
    "cost_usd",
    "judge_cost_usd",
    "total_seconds_p50",
    "total_seconds_p95",
    "wall_seconds",
    "sandbox_seconds",
    "paid_idle_seconds",
)
MAX_TABLE_ROWS = 200
TAG_PREFIX = "sandbox_pipeline"
MAX_MESSAGE_CHARS = 160


def asked_tags(config: OrchestrationConfig) -> dict[str, str]:
    """What the runs page filters by, known from the start."""
    return {
        f"{TAG_PREFIX}/repo": repo_name(config),
        f"{TAG_PREFIX}/model": config.model,
        f"{TAG_PREFIX}/agent": config.agent.kind,
    }


def outcome_tags(done: Completed) -> dict[str, str]:
    """What came of it: `verified`, `all_succeeded`, `some_succeeded` or `none_succeeded`."""
    summary = done.summary
    if summary["verified"]:
        outcome = "verified"
    elif summary["succeeded"] == summary["num_forks"]:
        outcome = "all_succeeded"
    else:
        outcome = "some_succeeded" if summary["succeeded"] else "none_succeeded"
    return {f"{TAG_PREFIX}/outcome": outcome}


def fork_metrics_metadata(done: Completed) -> Metadata:
    """The table of forks, where their artifacts are, and the numbers of the summary."""
    return {
        "forks": dg.MetadataValue.table([_record(row) for row in done.rows[:MAX_TABLE_ROWS]]),
        "artifacts": dg.MetadataValue.path(Path(done.orchestration.artifacts)),
        "workflow_id": dg.MetadataValue.text(done.orchestration.workflow_id),
        **summary_metadata(done.summary),
    }


def summary_metadata(summary: Row) -> Metadata:
    """Numbers only; unknown ones are left out, so that no plot shows a false 0."""
    metadata: Metadata = {}
    for name in _NUMBERS:
        value = summary[name]
        if isinstance(value, int):
            metadata[name] = dg.MetadataValue.int(value)
        elif value is not None:
            metadata[name] = dg.MetadataValue.float(float(value))
    return metadata


def _record(row: Row) -> dg.TableRecord:
    values: dict[str, str | int | float | bool] = {}
    for name in _COLUMNS:
        value = cell(row[name])
        values[name] = value[:MAX_MESSAGE_CHARS] if isinstance(value, str) else value
    return dg.TableRecord(values)


def cell(value: object) -> str | int | float | bool:
    """A value as a table of metadata may have it; empty where it is unknown."""
    if value is None:
        return ""
    if isinstance(value, float):
        return round(value, 4)
    return value if isinstance(value, int) else str(value)
