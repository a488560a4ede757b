"""`sandbox-pipeline show`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.markup import escape

from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.cli.tables import duration, fork_table
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.records import Fork, Orchestration
from sandbox_pipeline.runtime import Runtime


@click.command("show")
@click.argument("workflow", required=False)
@click.option("--fork", "fork_num", type=int, help="Print this fork's transcript instead.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def command(workflow: str | None, fork_num: int | None, *, as_json: bool) -> int:
    r"""Show the forks of WORKFLOW (default: the latest), or one fork's transcript.

    \b
    Examples:
      sandbox-pipeline show
      sandbox-pipeline show nightly-2026-11-23 --fork 3
    """

    async def read(runtime: Runtime) -> tuple[Orchestration, list[Fork]]:
        found = await find_orchestration(runtime, workflow)
        return found, await runtime.store.forks(found.workflow_id)

    orchestration, forks = with_runtime(read)
    if fork_num is not None:
        _print_transcript(orchestration, forks, fork_num, as_json=as_json)
    elif as_json:
        click.echo(json.dumps(result_document(orchestration, forks)))
    else:
        print_result(orchestration, forks)
    return 0


def result_document(orchestration: Orchestration, forks: Sequence[Fork]) -> dict[str, Any]:
    """What `--json` prints of an orchestration: its rows in the two metrics tables."""
    from sandbox_pipeline.journal import artifacts_of
    from sandbox_pipeline.metrics import fork_row, summary_row
    from sandbox_pipeline.results import judging_document, place_row, ranking_of

    ranked = ranking_of(orchestration, forks)
    winner = ranked.winner
    rows = [fork_row(fork, orchestration, str(artifacts_of(orchestration, fork))) for fork in forks]
    return {
        "workflow_id": orchestration.workflow_id,
        "complete": orchestration.complete,
        "summary": _plain(summary_row(orchestration, forks)),
        "forks": [_plain(row) for row in rows],
        "decision": ranked.headline,
        "winner": winner and winner.fork_num,
        "judge": judging_document(orchestration.judging),
        "ranking": [place_row(orchestration.workflow_id, it, winner) for it in ranked.places],
    }


def print_result(
    orchestration: Orchestration, forks: Sequence[Fork], *, run_id: str | None = None
) -> None:
    """The table, where everything is, and what to do next."""
    from sandbox_pipeline.cli.executing import ui_hint

    console = Console()
    console.print(fork_table(orchestration, forks))
    if all(fork.outcome.is_terminal for fork in forks):
        _print_ranking(console, orchestration, forks)
    folder = orchestration.artifacts
    alive = sum(fork.timings.sandbox_seconds or 0 for fork in forks)
    working = sum(fork.timings.agent_seconds or 0 for fork in forks)
    lines = [
        ("patches", f"{folder}/fork_*/patch.diff"),
        ("transcripts", f"{folder}/fork_*/transcript.jsonl"),
        ("sandboxes", f"{duration(alive)} alive in all, {duration(max(0, alive - working))} idle"),
        ("report", f"sandbox-pipeline report {orchestration.workflow_id} --open"),
        ("timeline", f"sandbox-pipeline events {orchestration.workflow_id}"),
        ("metrics", "sandbox-pipeline export --format csv"),
    ]
    last_run = run_id or next((fork.run_id for fork in forks if fork.run_id), None)
    if last_run is not None:
        lines.append(("this run in the UI", ui_hint(last_run)))
    for name, text in lines:
        console.print(f"[bold]{name}[/bold]: {escape(text)}", soft_wrap=True, highlight=False)


def _print_ranking(console: Console, orchestration: Orchestration, forks: Sequence[Fork]) -> None:
    from sandbox_pipeline.metrics import saving_of
    from sandbox_pipeline.results import ranking_of

    ranked = ranking_of(orchestration, forks)
    console.print("[bold]ranking[/bold]")
    for place in ranked.places:
        line = f"{place.place:>4}. fork {place.fork_num}: {place.reason}"
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if ranked.judge:
        said = ranked.judge[0].upper() + ranked.judge[1:]
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    saving = saving_of(orchestration, forks)
    if saving.forks:
        spared = [] if saving.agent_seconds is None else [duration(saving.agent_seconds)]
        spared += [] if saving.cost_usd is None else [f"${saving.cost_usd:.2f}"]
        about = f", which saved about {' and '.join(spared)} of agents" if spared else ""
        console.print(f"{saving.forks} forks were stopped early{about}", highlight=False)
    style = "bold green" if ranked.winner else "bold yellow"
    console.print(
        ranked.headline[0].upper() + ranked.headline[1:],
        style=style, markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip


def _print_transcript(
    orchestration: Orchestration, forks: Sequence[Fork], fork_num: int, *, as_json: bool
) -> None:
    from sandbox_pipeline.agents.transcript import read_transcript
    from sandbox_pipeline.cli.transcript import print_transcript
    from sandbox_pipeline.journal import artifacts_of

    if not 0 <= fork_num < len(forks):
        msg = f"--fork: {fork_num} is not one of 0 to {len(forks) - 1}"
        raise ConfigError(msg)
    path: Path = artifacts_of(orchestration, forks[fork_num]) / "transcript.jsonl"
    if not path.exists():
        msg = f"--fork: fork {fork_num} has no transcript ({path})"
        raise ConfigError(msg)
    entries = read_transcript(path)
    if not as_json:
        print_transcript(entries, Console())
        return
    for entry in entries:
        click.echo(entry.model_dump_json(exclude_none=True))


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value.isoformat() if hasattr(value, "isoformat") else value
        for name, value in row.items()
    }
