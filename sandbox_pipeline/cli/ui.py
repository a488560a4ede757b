"""`sandbox-pipeline ui`."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import click

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.instance import ensure_home
from sandbox_pipeline.settings import Settings, default_home

WORKSPACE = """\
load_from:
  - python_module:
      module_name: sandbox_pipeline.definitions
      location_name: sandbox_pipeline
"""


@click.command("ui")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=int, help="Default: SANDBOX_PIPELINE_PORT, else 3000.")
def command(host: str, port: int | None) -> int:
    """Start Dagster's webserver and daemon on the instance that this command line uses."""
    home = ensure_home(default_home(os.environ))
    settings = Settings.from_environ(os.environ, home=home)
    beside = Path(sys.executable).parent / "dagster"
    program = str(beside) if beside.exists() else shutil.which("dagster")
    if program is None:
        msg = "the dagster command is not installed beside this one"
        raise ConfigError(msg)
    # Not by -m: the code location must have the name that `launch` and workspace.yaml use.
    workspace = home / "workspace.yaml"
    workspace.write_text(WORKSPACE, encoding="utf-8")
    arguments = [program, "dev", "-w", str(workspace), "-h", host, "-p", str(port or settings.port)]
    os.execv(program, arguments)  # noqa: S606 - this process becomes the UI
    return 0
