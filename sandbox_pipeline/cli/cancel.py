"""`sandbox-pipeline cancel`."""

from __future__ import annotations

import asyncio
import time

import click

from sandbox_pipeline.cli import exit_codes
from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.records import Control, Orchestration
from sandbox_pipeline.runtime import Runtime

WAIT_SECONDS = 60.0


@click.command("cancel")
@click.argument("workflow")
def command(workflow: str) -> int:
    """Cancel WORKFLOW: its agents stop, its sandboxes end, its run becomes CANCELED.

    Works from any machine that reaches the store; returns once all sandboxes are gone.
    """
    return with_runtime(lambda runtime: _cancel(runtime, workflow))


async def _cancel(runtime: Runtime, workflow: str) -> int:
    from sandbox_pipeline.orchestrating import cancel_now
    from sandbox_pipeline.ownership import is_dead

    found = await find_orchestration(runtime, workflow)
    if found.complete:
        click.echo(f"{workflow} is complete already; nothing to cancel")
        return exit_codes.SUCCESS
    found = await runtime.store.update(
        Orchestration, found.key, lambda it: it.evolve(control=Control.CANCEL)
    )
    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        found = await runtime.store.need(Orchestration, found.key)
        if found.complete:
            click.echo(f"{workflow} is cancelled; no sandbox is left")
            return exit_codes.SUCCESS
        if found.owner is None or is_dead(found.owner):
            await cancel_now(runtime, found)
            continue
        await asyncio.sleep(0.2)
    leases = await runtime.store.leases(workflow)
    click.echo(
        f"{workflow}: {len(leases)} sandboxes are not gone after {WAIT_SECONDS:g} s", err=True
    )
    return exit_codes.INTERNAL
