"""`sandbox-pipeline resume`."""

from __future__ import annotations

import click

from sandbox_pipeline.cli import exit_codes
from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.records import Control, Orchestration
from sandbox_pipeline.runtime import Runtime


@click.command("resume")
@click.argument("workflow")
@click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document at the end and nothing else."
)
def command(workflow: str, *, as_json: bool) -> int:
    """Let WORKFLOW go on: after `pause`, or after its run died or failed.

    Where no run works on it, it is taken up in this terminal, with the configuration that it
    was started with: results are kept, and agents still at work are followed, not run again.
    """
    from sandbox_pipeline.cli.run import run_and_report

    config = with_runtime(lambda runtime: _resume(runtime, workflow))
    if config is None:
        return exit_codes.SUCCESS
    return run_and_report(config, as_json=as_json)


async def _resume(runtime: Runtime, workflow: str) -> OrchestrationConfig | None:
    """What to run here; None where there is nothing to do but a word."""
    from sandbox_pipeline.ownership import is_dead

    found = await find_orchestration(runtime, workflow)
    if found.complete:
        click.echo(f"{workflow} is complete already; see: sandbox-pipeline show {workflow}")
        return None
    alive = found.owner is not None and not is_dead(found.owner)

    def going_on(it: Orchestration) -> Orchestration:
        if alive and it.control is Control.CANCEL:
            msg = f"WORKFLOW: {workflow!r} is being cancelled; wait for that, then resume it"
            raise ConfigError(msg)
        return it.evolve(control=Control.RUN)

    await runtime.store.update(Orchestration, found.key, going_on)
    if alive and found.owner is not None:
        click.echo(f"{workflow} goes on in run {found.owner.run_id}")
        return None
    return found.config.model_copy(update={"workflow_id": workflow})
