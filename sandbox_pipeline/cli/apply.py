"""`sandbox-pipeline apply`."""

from __future__ import annotations

from pathlib import Path

import click

from sandbox_pipeline.cli.common import find_fork, with_runtime
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.results import read_patch
from sandbox_pipeline.workspace.branch import commit_patch


@click.command("apply")
@click.argument("fork_num", type=int, metavar="FORK")
@click.option("--workflow", help="The orchestration; default: the latest.")
@click.option("--branch", help="Name of the new branch; default: forks/WORKFLOW/FORK.")
@click.option(
    "--repo",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=".",
    help="Your checkout; default: here.",
)
def command(fork_num: int, workflow: str | None, branch: str | None, repo: Path) -> int:
    r"""Make a new branch with the patch of FORK in your own checkout.

    The branch starts from the commit that the forks started from. Your files, your index and the
    branch you are on are not touched, whatever state they are in.

    \b
    Examples:
      sandbox-pipeline apply 3
      sandbox-pipeline apply 3 --branch fix-slugs && git switch fix-slugs
    """
    orchestration, fork = with_runtime(lambda runtime: find_fork(runtime, workflow, fork_num))
    patch = read_patch(fork)
    if not patch or fork.patch is None or fork.patch.path is None:
        msg = f"FORK: fork {fork_num} left no patch"
        raise ConfigError(msg)
    if fork.patch.truncated:
        msg = f"FORK: only the beginning of the patch of fork {fork_num} was kept (max_patch_mb)"
        raise ConfigError(msg)
    name = branch or f"forks/{orchestration.workflow_id}/{fork_num}"
    message = (
        f"{orchestration.config.prompt.strip().splitlines()[0][:72]}\n\n"
        f"Made by fork {fork_num} of {orchestration.workflow_id}.\n"
    )
    commit = commit_patch(
        repo, name, orchestration.base_commit or "", Path(fork.patch.path), message
    )
    if fork.patch.secret_leak:
        click.echo("warning: a secret in this patch was replaced by [redacted]", err=True)
    click.echo(f"branch {name} is at {commit[:12]}; look at it: git switch {name}")
    return 0
