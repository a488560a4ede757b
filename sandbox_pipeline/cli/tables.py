"""Forks as a table on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.markup import escape
from rich.table import Table
from rich.text import Text

from sandbox_pipeline.clock import now
from sandbox_pipeline.records import Fork, Orchestration, Outcome, Stage

_STYLES = {
    Outcome.PENDING: "dim",
    Outcome.RUNNING: "cyan",
    Outcome.SUCCESS: "green",
    Outcome.FAILED: "red",
    Outcome.TIMEOUT: "yellow",
    Outcome.CANCELLED: "magenta",
    Outcome.BUDGET_EXCEEDED: "yellow",
}


def fork_table(orchestration: Orchestration, forks: Sequence[Fork]) -> Table:
    """A line a fork: outcome, stage, time, cost, patch, and what it said."""
    table = Table(title=title(orchestration, forks), title_justify="left", expand=False)
    table.add_column("fork", justify="right")
    table.add_column("outcome", no_wrap=True)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("cost", justify="right", no_wrap=True)
    table.add_column("patch", no_wrap=True)
    table.add_column("message", overflow="fold", max_width=70)
    for fork in forks:
        table.add_row(
            str(fork.fork_num),
            outcome_text(fork),
            elapsed(fork),
            cost_text(fork),
            patch_text(fork),
            escape(fork.message or fork.progress),
        )
    return table


def title(orchestration: Orchestration, forks: Sequence[Fork]) -> str:
    """One line above the table."""
    done = sum(fork.outcome.is_terminal for fork in forks)
    commit = (orchestration.base_commit or "")[:10]
    return escape(
        f"{orchestration.workflow_id}: {done} of {orchestration.config.num_forks} done, "
        f"{orchestration.provider}, {orchestration.config.repo_url} "
        f"{orchestration.branch or ''} {commit}".rstrip()
    )


def outcome_text(fork: Fork) -> Text:
    """The outcome, with why it failed, or the stage of a fork at work."""
    if fork.outcome.is_terminal:
        label = fork.outcome.value
        if fork.failure_class is not None:
            label += f" ({fork.failure_class.value})"
        if fork.stage is not Stage.DONE:
            label += " …"
    else:
        label = fork.stage.value
    return Text(label, style=_STYLES[fork.outcome])


def elapsed(fork: Fork) -> str:
    """How long the fork took or has been at it."""
    seconds = fork.total_seconds
    if seconds is None:
        if fork.started_at is None:
            return ""
        seconds = now().seconds_since(fork.started_at)
    return duration(seconds)


def duration(seconds: float) -> str:
    """Such as `4.2 s`, `3:07` or `1:02:03`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cost_text(fork: Fork) -> str:
    """US dollars; a dash where unknown."""
    cost = fork.result.usage.cost_usd if fork.result else fork.cost_so_far_usd
    return "-" if cost is None else f"${cost:.4f}"


def patch_text(fork: Fork) -> str:
    """Such as `2 files +10 -3`."""
    if fork.patch is None:
        return "-"
    if fork.patch.size_bytes == 0:
        return "empty"
    files = f"{fork.patch.files_changed} file{'s' if fork.patch.files_changed != 1 else ''}"
    return f"{files} +{fork.patch.insertions} -{fork.patch.deletions}"
