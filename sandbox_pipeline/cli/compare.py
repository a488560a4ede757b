"""`sandbox-pipeline compare`."""

from __future__ import annotations

import dataclasses
import json

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.comparison import Compared, compared, repo_name
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.records import Fork, Orchestration
from sandbox_pipeline.results import history
from sandbox_pipeline.runtime import Runtime

MAX_PROMPT_CHARS = 40


@click.command("compare")
@click.argument("workflows", nargs=-1, metavar="WORKFLOW…")
@click.option(
    "--last",
    type=click.IntRange(min=1),
    help="Compare the latest so many orchestrations that are over, instead of named ones.",
)
@click.option(
    "--by",
    type=click.Choice(["workflow", "model", "repo", "prompt", "agent", "day", "month"]),
    multiple=True,
    help="What stands for one side; orchestrations with the same are summed up. Repeatable; "
    "default: workflow, with --last model and repo. Days and months are UTC.",
)
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def command(
    workflows: tuple[str, ...], last: int | None, by: tuple[str, ...], *, as_json: bool
) -> int:
    r"""Compare models, repositories, prompts, agents or times: pass rate, cost of a pass, time.

    The pass rate comes with its 95% confidence interval (Wilson): where intervals overlap, more
    forks are needed to tell the sides apart.

    \b
    Examples:
      sandbox-pipeline compare fix-with-sonnet fix-with-opus
      sandbox-pipeline compare run-1 run-2 run-3 --by model
      sandbox-pipeline compare --last 100
      sandbox-pipeline compare --last 500 --by model --by month
    """
    if bool(workflows) == (last is not None):
        msg = "WORKFLOW: name orchestrations to compare, or give --last N; one of the two"
        raise ConfigError(msg)
    by = by or (("workflow",) if workflows else ("model", "repo"))

    async def read(runtime: Runtime) -> list[tuple[Orchestration, list[Fork]]]:
        if last is not None:
            return await history(runtime, last)
        found = [await find_orchestration(runtime, name) for name in dict.fromkeys(workflows)]
        return [(item, await runtime.store.forks(item.workflow_id)) for item in found]

    sides: dict[str, list[tuple[Orchestration, list[Fork]]]] = {}
    for orchestration, forks in with_runtime(read):
        name = ", ".join(_side(orchestration, each) for each in by)
        sides.setdefault(name, []).append((orchestration, forks))
    if last is not None:
        sides = dict(sorted(sides.items()))
    rows = [compared(name, parts) for name, parts in sides.items()]
    if as_json:
        click.echo(json.dumps([{**dataclasses.asdict(row), "rate": row.rate} for row in rows]))
    else:
        _print(rows, ", ".join(by))
    return 0


def _side(orchestration: Orchestration, by: str) -> str:
    config = orchestration.config
    if by == "model":
        return config.model
    if by == "repo":
        return repo_name(config)
    if by in ("day", "month"):
        return orchestration.requested_at.at.strftime("%Y-%m-%d" if by == "day" else "%Y-%m")
    if by == "agent":
        return config.agent.kind
    if by == "prompt":
        line = " ".join(config.prompt.split())
        return line if len(line) <= MAX_PROMPT_CHARS else f"{line[: MAX_PROMPT_CHARS - 1]}…"
    return orchestration.workflow_id


def _print(rows: list[Compared], by: str) -> None:
    table = Table(show_edge=False)
    for name in (by, "forks", "passed", "pass rate", "95% interval", "cost a pass", "agent median"):
        table.add_column(name, justify="left" if name == by else "right")
    for row in rows:
        cost = "unknown" if row.cost_per_pass_usd is None else f"${row.cost_per_pass_usd:.4f}"
        if row.cost_per_pass_usd is not None and row.forks_without_cost:
            cost = f"≥ {cost}"
        table.add_row(
            escape(row.name),
            str(row.forks),
            f"{row.passed} {'verified' if row.by_verification else 'succeeded'}",
            f"{row.rate:.0%}",
            f"{row.low:.0%} to {row.high:.0%}",
            cost,
            "" if row.seconds_p50 is None else f"{row.seconds_p50:.1f} s",
        )
    console = Console()
    console.print(table)
    if len({row.by_verification for row in rows}) > 1:
        console.print("Some sides were verified and some not: their rates mean different things.")
