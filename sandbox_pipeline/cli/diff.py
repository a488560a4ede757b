"""`sandbox-pipeline diff`."""

from __future__ import annotations

import difflib

import click
from rich.console import Console
from rich.text import Text

from sandbox_pipeline.cli.common import find_fork, with_runtime
from sandbox_pipeline.ranking import digest_of
from sandbox_pipeline.records import Fork
from sandbox_pipeline.results import read_patch
from sandbox_pipeline.runtime import Runtime

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


@click.command("diff")
@click.argument("left", type=int)
@click.argument("right", type=int)
@click.option("--workflow", help="The orchestration; default: the latest.")
def command(left: int, right: int, workflow: str | None) -> int:
    r"""Show in what the patches of forks LEFT and RIGHT differ.

    \b
    Examples:
      sandbox-pipeline diff 0 3
      sandbox-pipeline diff 0 3 --workflow nightly | less -R
    """

    async def read(runtime: Runtime) -> tuple[Fork, Fork]:
        orchestration, one = await find_fork(runtime, workflow, left)
        _, two = await find_fork(runtime, orchestration.workflow_id, right)
        return one, two

    one, two = (read_patch(fork) for fork in with_runtime(read))
    console = Console()
    if digest_of(one) == digest_of(two):
        console.print(f"forks {left} and {right} made the same change")
        return 0
    for line in difflib.unified_diff(_lines(one), _lines(two), f"fork {left}", f"fork {right}",
                                     lineterm=""):  # fmt: skip
        console.print(Text(line, style=_STYLES.get(line[:1], "")), soft_wrap=True)
    return 0


def _lines(patch: bytes) -> list[str]:
    text = patch.decode("utf-8", "replace")
    return [line for line in text.split("\n") if not line.startswith("index ")]
