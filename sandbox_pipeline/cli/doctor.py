"""`sandbox-pipeline doctor`."""

from __future__ import annotations

import json
from pathlib import Path

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sandbox_pipeline.cli import exit_codes
from sandbox_pipeline.cli.common import with_runtime
from sandbox_pipeline.cli.run import gather
from sandbox_pipeline.config import OrchestrationConfig, parse_config


@click.command("doctor")
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path),
    help="Check for this configuration; default: the demo's.",
)
@click.option("--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Change a field.")
@click.option("--json", "as_json", is_flag=True, help="For machines.")
def command(config_file: Path | None, settings: tuple[str, ...], *, as_json: bool) -> int:
    """Check whether this machine can run a configuration, and what would help where not.

    The exit code is 0 when the configuration could run, else 2.
    """
    from sandbox_pipeline.diagnosis import diagnose

    config = _config(config_file, settings)
    checks = with_runtime(lambda runtime: diagnose(runtime, config))
    if as_json:
        click.echo(json.dumps([vars(check) for check in checks]))
    else:
        table = Table()
        for name in ("check", "state", "finding", "remedy"):
            # Paths and addresses are worth more whole than the table's shape.
            table.add_column(name, overflow="fold")
        styles = {"ok": "green", "warning": "yellow", "failed": "red"}
        for check in checks:
            state = f"[{styles[check.state]}]{check.state}[/]"
            table.add_row(check.name, state, escape(check.finding), escape(check.remedy))
        Console().print(table)
    broken = any(check.state == "failed" for check in checks)
    return exit_codes.BAD_CONFIGURATION if broken else exit_codes.SUCCESS


def _config(config_file: Path | None, settings: tuple[str, ...]) -> OrchestrationConfig:
    if config_file is not None:
        return gather(config_file, settings, {})
    from sandbox_pipeline import demo

    if not settings:
        return parse_config(demo.CONFIG)
    return gather(
        None,
        settings,
        {
            **{"repo": demo.CONFIG["repo_url"], "prompt": demo.PROMPT},
            "agent_command": demo.CONFIG["agent"]["command"],
        },
    )
