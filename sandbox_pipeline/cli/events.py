"""`sandbox-pipeline events`."""

from __future__ import annotations

import click

from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.cli.live import event_line
from sandbox_pipeline.records import Event
from sandbox_pipeline.runtime import Runtime


@click.command("events")
@click.argument("workflow", required=False)
@click.option("--fork", "fork_num", type=int, help="Only this fork's events.")
@click.option("--json", "as_json", is_flag=True, help="One JSON document a line.")
def command(workflow: str | None, fork_num: int | None, *, as_json: bool) -> int:
    """Print the timeline of WORKFLOW (default: the latest), in order; times are UTC."""

    async def read(runtime: Runtime) -> list[Event]:
        found = await find_orchestration(runtime, workflow)
        return await runtime.store.events(found.workflow_id)

    for event in with_runtime(read):
        if fork_num is None or event.fork_num == fork_num:
            click.echo(event.model_dump_json() if as_json else event_line(event))
    return 0
