"""`sandbox-pipeline reap`."""

from __future__ import annotations

import json

import click

from sandbox_pipeline.cli.common import with_runtime


@click.command("reap")
@click.option("--dry-run", is_flag=True, help="Say what would be ended; end nothing.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def command(*, dry_run: bool, as_json: bool) -> int:
    """End sandboxes of this deployment that nobody owns any more.

    Safe to run at any time, beside running orchestrations and other reapers; made for cron.
    """
    from sandbox_pipeline.reaper import reap

    reaped = with_runtime(lambda runtime: reap(runtime, dry_run=dry_run))
    if as_json:
        click.echo(json.dumps([vars(item) for item in reaped]))
        return 0
    word = "would end" if dry_run else "ended"
    for item in reaped:
        click.echo(f"{word} {item.provider} {item.sandbox_id}: {item.reason}")
    if not reaped:
        click.echo("nothing to reap")
    return 0
