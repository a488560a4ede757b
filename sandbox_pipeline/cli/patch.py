"""`sandbox-pipeline patch`."""

from __future__ import annotations

import sys

import click

from sandbox_pipeline.cli.common import find_fork, with_runtime
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.results import read_patch


@click.command("patch")
@click.argument("fork_num", type=int, metavar="FORK")
@click.option("--workflow", help="The orchestration; default: the latest.")
def command(fork_num: int, workflow: str | None) -> int:
    r"""Print the patch of FORK, byte for byte, for `git apply`.

    \b
    Examples:
      sandbox-pipeline patch 3 > fix.diff
      sandbox-pipeline patch 3 --workflow nightly | git apply --index
    """
    _, fork = with_runtime(lambda runtime: find_fork(runtime, workflow, fork_num))
    patch = read_patch(fork)
    if not patch:
        msg = f"FORK: fork {fork_num} left no patch"
        raise ConfigError(msg)
    if fork.patch is not None and fork.patch.truncated:
        click.echo("warning: only the beginning of this patch was kept (max_patch_mb)", err=True)
    sys.stdout.buffer.write(patch)
    sys.stdout.buffer.flush()
    return 0
