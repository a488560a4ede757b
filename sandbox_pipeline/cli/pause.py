"""`sandbox-pipeline pause`."""

from __future__ import annotations

import click

from sandbox_pipeline.cli import exit_codes
from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.records import Control, Orchestration
from sandbox_pipeline.runtime import Runtime


@click.command("pause")
@click.argument("workflow")
def command(workflow: str) -> int:
    """Start no further forks of WORKFLOW; those at work go on to their end.

    `sandbox-pipeline resume` takes it back.
    """
    return with_runtime(lambda runtime: _pause(runtime, workflow))


async def _pause(runtime: Runtime, workflow: str) -> int:
    found = await find_orchestration(runtime, workflow)
    if found.complete:
        msg = f"WORKFLOW: {workflow!r} is complete; there is nothing to pause"
        raise ConfigError(msg)

    def paused(it: Orchestration) -> Orchestration:
        if it.control is Control.CANCEL:
            msg = f"WORKFLOW: {workflow!r} is being cancelled"
            raise ConfigError(msg)
        return it.evolve(control=Control.PAUSE)

    await runtime.store.update(Orchestration, found.key, paused)
    click.echo(f"{workflow} is paused; go on with: sandbox-pipeline resume {workflow}")
    return exit_codes.SUCCESS
