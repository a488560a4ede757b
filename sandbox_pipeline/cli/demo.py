"""`sandbox-pipeline demo`."""

from __future__ import annotations

from pathlib import Path

import click

from sandbox_pipeline import demo
from sandbox_pipeline.cli import exit_codes
from sandbox_pipeline.config import parse_config
from sandbox_pipeline.records import Fork


@click.command("demo")
@click.option(
    "--isolation",
    type=click.Choice(["bubblewrap", "none"]),
    default="bubblewrap",
    help="'none' runs the demo's script as you, for machines without bubblewrap.",
    show_default=True,
)
def command(isolation: str) -> int:
    """Make a small repository with a failing test and let three forks try to mend it.

    Each patch is verified by the repository's tests in a fresh sandbox. Fork 0 solves the task,
    fork 1 makes a wrong change, fork 2 crashes. The exit code is 0 exactly when that is what
    happened.
    """
    from sandbox_pipeline.cli.executing import execute
    from sandbox_pipeline.cli.show import print_result
    from sandbox_pipeline.report import REPORT_FILE
    from sandbox_pipeline.results import ranking_of

    config = parse_config(
        {**demo.CONFIG, "sandbox": {"provider": "local", "isolation": isolation}}, source="demo"
    )
    done = execute(config, quiet=False)
    if done.orchestration is None:
        click.echo(f"error: {done.error}", err=True)
        return exit_codes.RUN_FAILED
    print_result(done.orchestration, done.forks, run_id=done.run_id)
    if done.error is not None:
        click.echo(f"error: {done.error}", err=True)
        return exit_codes.RUN_FAILED
    wrong = [text for fork in done.forks if (text := _deviation(fork))]
    for text in wrong:
        click.echo(f"not as expected: {text}", err=True)
    if not wrong:
        click.echo("\nAs expected: fork 0 solved the task, fork 1 did not, fork 2 crashed.")
        ranked = ranking_of(done.orchestration, done.forks)
        click.echo(f"The winner: {ranked.headline}")
        click.echo(f"The report: {Path(done.orchestration.artifacts) / REPORT_FILE}")
    return exit_codes.INTERNAL if wrong else exit_codes.SUCCESS


def _deviation(fork: Fork) -> str | None:
    verdict = fork.verification.outcome if fork.verification else None
    if verdict is not demo.VERDICTS[fork.fork_num]:
        return f"fork {fork.fork_num} was found {verdict}, not {demo.VERDICTS[fork.fork_num]}"
    outcome, exit_code = demo.EXPECTED[fork.fork_num]
    actual = fork.result.exit_code if fork.result else None
    if fork.outcome is not outcome or actual != exit_code:
        return (
            f"fork {fork.fork_num} ended as {fork.outcome} with exit code {actual}, "
            f"not as {outcome} with {exit_code}"
        )
    if fork.patch is None or fork.patch.size_bytes == 0:
        return f"fork {fork.fork_num} left no patch"
    return None
