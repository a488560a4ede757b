"""`sandbox-pipeline cancel`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import click

from sandbox_pipeline.cli import exit_codes
from sandbox_pipeline.cli.common import find_orchestration, with_runtime
from sandbox_pipeline.errors import ConfigError, OwnershipError
from sandbox_pipeline.records import Control, Fork, Orchestration, SandboxState, fork_key
from sandbox_pipeline.runtime import Runtime

WAIT_SECONDS = 60.0


@click.command("cancel")
@click.argument("workflow")
@click.option("--fork", "fork_num", type=int, help="Only this fork; it keeps its patch so far.")
def command(workflow: str, fork_num: int | None) -> int:
    """Cancel WORKFLOW: its agents stop, its sandboxes end, its run becomes CANCELED.

    Works from any machine that reaches the store; returns once all sandboxes are gone.
    """
    if fork_num is None:
        return with_runtime(lambda runtime: _cancel(runtime, workflow))
    return with_runtime(lambda runtime: _cancel_fork(runtime, workflow, fork_num))


async def _cancel(runtime: Runtime, workflow: str) -> int:
    found = await find_orchestration(runtime, workflow)
    if found.complete:
        click.echo(f"{workflow} is complete already; nothing to cancel")
        return exit_codes.SUCCESS
    await runtime.store.update(
        Orchestration, found.key, lambda it: it.evolve(control=Control.CANCEL)
    )

    async def is_over() -> bool:
        return (await runtime.store.need(Orchestration, found.key)).complete

    if await _wait(runtime, found, is_over):
        click.echo(f"{workflow} is cancelled; no sandbox is left")
        return exit_codes.SUCCESS
    leases = await runtime.store.leases(workflow)
    click.echo(
        f"{workflow}: {len(leases)} sandboxes are not gone after {WAIT_SECONDS:g} s", err=True
    )
    return exit_codes.INTERNAL


async def _cancel_fork(runtime: Runtime, workflow: str, fork_num: int) -> int:
    found = await find_orchestration(runtime, workflow)
    key = fork_key(workflow, fork_num)
    fork = await runtime.store.get(Fork, key)
    if fork is None:
        msg = f"--fork: {fork_num} is not one of 0 to {found.config.num_forks - 1}"
        raise ConfigError(msg)
    if fork.outcome.is_terminal:
        click.echo(f"fork {fork_num} of {workflow} has ended already as {fork.outcome.value}")
        return exit_codes.SUCCESS
    await runtime.store.update(Fork, key, lambda it: it.evolve(control=Control.CANCEL))

    async def is_over() -> bool:
        now = await runtime.store.need(Fork, key)
        gone = now.sandbox_state in (None, SandboxState.GONE)
        return now.outcome.is_terminal and gone

    if await _wait(runtime, found, is_over, whole=False):
        fork = await runtime.store.need(Fork, key)
        click.echo(f"fork {fork_num} of {workflow} ended as {fork.outcome.value}")
        return exit_codes.SUCCESS
    click.echo(
        f"fork {fork_num} of {workflow} ends as soon as a run works on it again: "
        f"sandbox-pipeline resume {workflow}",
        err=True,
    )
    return exit_codes.INTERNAL


async def _wait(
    runtime: Runtime,
    orchestration: Orchestration,
    is_over: Callable[[], Awaitable[bool]],
    *,
    whole: bool = True,
) -> bool:
    from sandbox_pipeline.orchestrating import cancel_now
    from sandbox_pipeline.ownership import is_dead

    deadline = time.monotonic() + WAIT_SECONDS
    while time.monotonic() < deadline:
        if await is_over():
            return True
        found = await runtime.store.need(Orchestration, orchestration.key)
        if found.owner is None or is_dead(found.owner):
            if not whole:
                return False
            try:
                await cancel_now(runtime, found)
            except OwnershipError:
                continue
        await asyncio.sleep(0.2)
    return False
