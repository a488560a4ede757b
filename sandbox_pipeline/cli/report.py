"""`sandbox-pipeline report`."""

from __future__ import annotations

from pathlib import Path

import click

from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.runtime import Runtime


@click.command("report")
@click.argument("workflow", required=False)
@click.option("--open", "open_it", is_flag=True, help="Open it in the browser.")
def command(workflow: str | None, *, open_it: bool) -> int:
    r"""Write the report of WORKFLOW (default: the latest) anew and print its path.

    \b
    Examples:
      sandbox-pipeline report --open
      sandbox-pipeline report nightly-2026-11-23
    """
    from sandbox_pipeline.report import write_report

    async def write(runtime: Runtime) -> Path:
        found = await find_orchestration(runtime, workflow)
        forks = await runtime.store.forks(found.workflow_id)
        try:
            return write_report(found, forks, runtime.redactor(found))
        except OSError as error:
            msg = f"the report can't be written: {error}"
            raise ConfigError(msg) from error

    path = with_runtime(write)
    click.echo(str(path))
    if open_it:
        click.launch(path.as_uri())
    return 0
