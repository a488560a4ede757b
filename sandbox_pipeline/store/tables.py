"""The tables. Columns of the two metrics tables are also the columns of the assets."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    Boolean,
    Column,
    DateTime,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
)

metadata = MetaData()

state = Table(
    "pipeline_state",
    metadata,
    Column("key", String(255), primary_key=True),
    Column("kind", String(32), nullable=False),
    Column("workflow_id", String(63), nullable=False),
    Column("fork_num", Integer),
    Column("status", String(32), nullable=False),
    Column("version", Integer, nullable=False),
    Column("value", Text, nullable=False),
    Index("ix_pipeline_state_workflow", "workflow_id", "kind", "status"),
    Index("ix_pipeline_state_kind", "kind", "status"),
)

events = Table(
    "pipeline_events",
    metadata,
    Column("seq", Integer, primary_key=True, autoincrement=True),
    Column("workflow_id", String(63), nullable=False),
    Column("fork_num", Integer),
    Column("name", String(64), nullable=False),
    Column("time", Float, nullable=False),
    Column("payload", Text, nullable=False),
    Index("ix_pipeline_events_workflow", "workflow_id", "seq"),
)

permits = Table(
    "creation_permits",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=True),
    Column("scope", String(64), nullable=False),
    Column("started_at", Float, nullable=False),
    Column("finished_at", Float),
    Index("ix_creation_permits_scope", "scope", "started_at"),
)

spending = Table(
    "spending",
    metadata,
    Column("workflow_id", String(63), primary_key=True),
    Column("fork_num", Integer, primary_key=True),
    Column("day", String(10), nullable=False),
    Column("reserved_usd", Float),
    Column("spent_usd", Float, nullable=False),
    Index("ix_spending_day", "day"),
)

fork_metrics = Table(
    "fork_metrics",
    metadata,
    Column("workflow_id", String(63), primary_key=True, comment="orchestration"),
    Column("fork_num", Integer, primary_key=True, comment="fork, from 0"),
    Column("run_id", String(64), comment="Dagster run that ended the fork"),
    Column("provider", String(32), comment="sandbox provider"),
    Column("sandbox_id", String(255), comment="the fork's last sandbox"),
    Column("agent", String(64), comment="kind of agent"),
    Column("agent_version", String(64), comment="version of the agent, where it tells"),
    Column("model", String(128), comment="model that answered, else the one asked for"),
    Column("outcome", String(32), nullable=False, comment="how the fork ended"),
    Column("failure_class", String(32), comment="why it failed"),
    Column("message", Text, comment="one line for people"),
    Column("base_commit", String(64), comment="commit the fork started from"),
    Column("create_attempts", Integer, comment="tries at creating a sandbox"),
    Column("health_attempts", Integer, comment="tries at the health check"),
    Column("agent_attempts", Integer, comment="runs of the agent"),
    Column("cleanup_attempts", Integer, comment="tries at ending the sandbox"),
    Column("queue_seconds", Float, comment="waiting for a slot and for the rate limit"),
    Column("create_seconds", Float, comment="creating the sandbox and its workspace"),
    Column("health_seconds", Float, comment="health check"),
    Column("agent_seconds", Float, comment="agent at work, the patch included"),
    Column("cleanup_seconds", Float, comment="ending the sandbox"),
    Column("total_seconds", Float, comment="from the end of the queue to the end of the fork"),
    Column("sandbox_seconds", Float, comment="sandboxes of this fork alive, summed"),
    Column("cpu_seconds", Float, comment="CPU time of the fork's last sandbox; empty: unknown"),
    Column("peak_memory_mb", Float, comment="most memory of its last sandbox, MiB; empty: unknown"),
    Column("sandbox_cost_usd", Float, comment="estimated US dollars for sandboxes; empty: unknown"),
    Column("input_tokens", Integer, comment="input tokens, neither written to nor from cache"),
    Column("output_tokens", Integer, comment="output tokens"),
    Column("cache_creation_input_tokens", Integer, comment="input tokens written to the cache"),
    Column("cache_read_input_tokens", Integer, comment="input tokens read from the cache"),
    Column("cost_usd", Float, comment="US dollars spent on the model; empty: unknown"),
    Column("cost_basis", String(32), comment="reported, computed or unknown"),
    Column("turns", Integer, comment="model turns"),
    Column("files_changed", Integer, comment="files in the patch"),
    Column("insertions", Integer, comment="lines added"),
    Column("deletions", Integer, comment="lines removed"),
    Column("patch_bytes", Integer, comment="size of the whole patch"),
    Column("patch_truncated", Boolean, comment="only a part of the patch was kept"),
    Column("output_truncated", Boolean, comment="the agent's output was cut"),
    Column("secret_leak", Boolean, comment="a secret was found in output or patch and removed"),
    Column("exit_code", Integer, comment="of the agent's process; 128 + n for signal n"),
    Column(
        "verification",
        String(16),
        nullable=False,
        comment="verified, rejected, unverified or error",
    ),
    Column("verify_reason", Text, comment="why, in one line"),
    Column("verify_seconds", Float, comment="verification, its sandbox included"),
    Column("verify_exit_code", Integer, comment="of verify_command"),
    Column("tests_passed", Integer, comment="by the JUnit report; empty: there is none"),
    Column("tests_failed", Integer, comment="by the JUnit report"),
    Column("tests_skipped", Integer, comment="by the JUnit report"),
    Column("protected_restored", Integer, comment="protected files that the patch had changed"),
    Column("verify_log_path", Text, comment="where the output of verify_command is"),
    Column("patch_path", Text, comment="where the patch is"),
    Column("transcript_path", Text, comment="where the transcript is"),
    Column("started_at", DateTime(timezone=True), comment="when the fork left the queue, UTC"),
    Column("ended_at", DateTime(timezone=True), comment="when the fork ended, UTC"),
)

orchestration_summary = Table(
    "orchestration_summary",
    metadata,
    Column("workflow_id", String(63), primary_key=True, comment="orchestration"),
    Column("run_id", String(64), comment="Dagster run that completed it"),
    Column("repo_url", Text, comment="repository, without credentials"),
    Column("branch", String(255), comment="branch"),
    Column("base_commit", String(64), comment="commit the forks started from"),
    Column("provider", String(32), comment="sandbox provider"),
    Column("agent", String(64), comment="kind of agent"),
    Column("model", String(128), comment="model asked for"),
    Column("num_forks", Integer, nullable=False, comment="planned forks"),
    Column("succeeded", Integer, nullable=False, comment="forks that ended as success"),
    Column("failed", Integer, nullable=False, comment="forks that ended as failed"),
    Column("timed_out", Integer, nullable=False, comment="forks that ended as timeout"),
    Column("cancelled", Integer, nullable=False, comment="forks that ended as cancelled"),
    Column("over_budget", Integer, nullable=False, comment="forks that ended as budget_exceeded"),
    Column("success_rate", Float, nullable=False, comment="succeeded / num_forks"),
    Column("verified", Integer, nullable=False, comment="forks whose patch was verified"),
    Column("rejected", Integer, nullable=False, comment="forks whose patch was rejected"),
    Column("stopped_early", Integer, nullable=False, comment="cancelled by stop_after_verified"),
    Column("saved_agent_seconds", Float, comment="estimate of what that saved"),
    Column("saved_usd", Float, comment="estimate of what that saved; empty: no cost is known"),
    Column(
        "cost_usd", Float, comment="sum of the known costs, the judge's too; empty: none is known"
    ),
    Column("judge_cost_usd", Float, comment="the judge's part of that; empty: none or unknown"),
    Column("forks_without_cost", Integer, nullable=False, comment="forks whose cost is unknown"),
    Column("total_seconds_p50", Float, comment="median of the forks' total_seconds"),
    Column("total_seconds_p95", Float, comment="95th percentile of the forks' total_seconds"),
    Column("wall_seconds", Float, comment="from the request to the completion"),
    Column("sandbox_seconds", Float, comment="sandboxes alive, summed"),
    Column("paid_idle_seconds", Float, comment="sandboxes alive while no agent ran, summed"),
    Column("requested_at", DateTime(timezone=True), comment="when it was asked for, UTC"),
    Column("completed_at", DateTime(timezone=True), comment="when all of it was done, UTC"),
)

# Not in the database but in the assets of the same names; here for their columns.
_assets = MetaData()


def _places() -> list[Column[Any]]:
    return [
        Column("workflow_id", String(63), comment="orchestration"),
        Column("place", Integer, comment="from 1; equal changes share a place"),
        Column("fork_num", Integer, comment="fork, from 0"),
        Column("winner", Boolean, comment="the patch to take"),
        Column("verification", String(16), comment="verified, rejected, unverified or error"),
        Column("outcome", String(32), comment="how the fork ended"),
        Column("tests_passed", Integer, comment="by the JUnit report"),
        Column("lines_changed", Integer, comment="added and removed"),
        Column("cost_usd", Float, comment="US dollars; empty: unknown"),
        Column("agent_seconds", Float, comment="agent at work"),
        Column("judge_share", Float, comment="of the judge's points; empty: not judged"),
        Column("score", Float, comment="weighted measures, comparable where verification is equal"),
        Column("same_as", Integer, comment="the fork that stands for the same change"),
        Column("reason", Text, comment="why it has this place, in words"),
    ]


ranking = Table("ranking", _assets, *_places())
winner = Table(
    "winner", _assets, *_places(), Column("patch_path", Text, comment="where the patch is")
)
trends = Table(
    "trends",
    _assets,
    Column("model", String(128), comment="model asked for"),
    Column("repository", String(80), comment="repository"),
    Column("orchestrations", Integer, comment="that are over, of the latest 200"),
    Column("forks", Integer, comment="planned in them"),
    Column("passed", Integer, comment="forks that were verified, else that succeeded"),
    Column("verified", Boolean, comment="passed means verified: all had a verify_command"),
    Column("pass_rate", Float, comment="passed / forks"),
    Column("pass_rate_low", Float, comment="lower end of its 95% interval (Wilson)"),
    Column("pass_rate_high", Float, comment="upper end"),
    Column("cost_per_pass_usd", Float, comment="all that was spent / passed; empty: unknown"),
    Column("agent_seconds_p50", Float, comment="median of the agents' time"),
)
