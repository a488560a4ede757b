"""`sandbox-pipeline status`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from typing import Any

import click
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.cli.tables import fork_table
from sandbox_pipeline.records import Fork, Orchestration
from sandbox_pipeline.runtime import Runtime

REFRESH_SECONDS = 0.5


@click.command("status")
@click.argument("workflow", required=False)
@click.option("--watch", is_flag=True, help="Go on until it is complete.")
@click.option("--json", "as_json", is_flag=True, help="For machines; with --watch a line a change.")
def command(workflow: str | None, *, watch: bool, as_json: bool) -> int:
    """Say how WORKFLOW (default: the latest) stands: its run, and each of its forks.

    Works from any machine that reaches the store. `show` has the results.
    """
    return with_runtime(lambda runtime: _status(runtime, workflow, watch=watch, as_json=as_json))


async def _status(runtime: Runtime, workflow: str | None, *, watch: bool, as_json: bool) -> int:
    console = Console()
    live = watch and not as_json and console.is_terminal
    shown = ""
    with Live(console=console, auto_refresh=False) if live else contextlib.nullcontext() as screen:
        while True:
            orchestration = await find_orchestration(runtime, workflow)
            workflow = orchestration.workflow_id
            forks = await runtime.store.forks(workflow)
            text = json.dumps(status_document(orchestration, forks))
            over = not watch or orchestration.complete
            if isinstance(screen, Live):
                screen.update(_table(orchestration, forks), refresh=True)
            elif as_json and text != shown:
                click.echo(text)
            elif not as_json and (over or text != shown):
                console.print(_table(orchestration, forks))
            shown = text
            if over:
                return 0
            await asyncio.sleep(REFRESH_SECONDS)


def status_document(orchestration: Orchestration, forks: Sequence[Fork]) -> dict[str, Any]:
    """What `--json` prints: what is true now, where `show --json` has the rows of the results."""
    owner = orchestration.owner
    return {
        "workflow_id": orchestration.workflow_id,
        "state": orchestration_state(orchestration),
        "run_id": owner.run_id if owner is not None else None,
        "num_forks": orchestration.config.num_forks,
        "forks": [
            {
                "fork_num": fork.fork_num,
                "outcome": fork.outcome.value,
                "failure_class": fork.failure_class and fork.failure_class.value,
                "stage": fork.stage.value,
                "control": fork.control.value,
                "attempts": fork.attempts,
                "sandbox_id": fork.sandbox_id,
                "sandbox_state": fork.sandbox_state and fork.sandbox_state.value,
                "cost_usd": _cost(fork),
                "message": fork.message or fork.progress,
            }
            for fork in forks
        ],
    }


def orchestration_state(orchestration: Orchestration) -> str:
    """`complete`, `left` (no run works on it), else what was asked: `run`, `pause`, `cancel`."""
    from sandbox_pipeline.ownership import is_dead

    if orchestration.complete:
        return "complete"
    if orchestration.owner is None or is_dead(orchestration.owner):
        return "left"
    return orchestration.control.value


def _table(orchestration: Orchestration, forks: Sequence[Fork]) -> Group:
    name = orchestration.workflow_id
    words = {
        "complete": "complete",
        "left": f"no run works on it; go on with: sandbox-pipeline resume {name}",
        "run": "running",
        "pause": f"paused; go on with: sandbox-pipeline resume {name}",
        "cancel": "being cancelled",
    }
    line = Text(f"state: {words[orchestration_state(orchestration)]}")
    return Group(fork_table(orchestration, forks), line)


def _cost(fork: Fork) -> float | None:
    from sandbox_pipeline.budgets import spent_usd

    return spent_usd(fork)
