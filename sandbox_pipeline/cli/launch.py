"""`sandbox-pipeline launch`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from sandbox_pipeline.cli.run import gather
from sandbox_pipeline.launching import DEFAULT_URL


@click.command("launch")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--url", default=DEFAULT_URL, show_default=True, help="The webserver.")
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change a field.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def command(file: Path, url: str, settings: tuple[str, ...], *, as_json: bool) -> int:
    r"""Submit the orchestration in FILE to a running webserver and print the run's id.

    \b
    Example:
      sandbox-pipeline launch orchestrations/nightly.yaml --set num_forks=5
    """
    from sandbox_pipeline.launching import launch

    run_id = launch(gather(file, settings, {}), url=url)
    if as_json:
        click.echo(json.dumps({"run_id": run_id, "url": f"{url}/runs/{run_id}"}))
    else:
        click.echo(f"launched: {url}/runs/{run_id}")
    return 0
