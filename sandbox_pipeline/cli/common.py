"""What several commands need."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.instance import ensure_home
from sandbox_pipeline.records import Fork, Orchestration, orchestration_key
from sandbox_pipeline.results import fork_of
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.settings import default_home

T = TypeVar("T")


def with_runtime(work: Callable[[Runtime], Awaitable[T]]) -> T:
    """Do something with the store and the providers of this machine's deployment."""
    home = ensure_home(default_home(os.environ))

    async def call() -> T:
        runtime = Runtime.open(home=home)
        try:
            return await work(runtime)
        finally:
            await runtime.close()

    return asyncio.run(call())


async def find_orchestration(runtime: Runtime, workflow_id: str | None) -> Orchestration:
    """The orchestration of this name, or the latest.

    Raises:
        ConfigError: there is none; the message names the latest ones.
    """
    if workflow_id is not None:
        found = await runtime.store.get(Orchestration, orchestration_key(workflow_id))
        if found is not None:
            return found
    latest = await runtime.store.orchestrations(limit=5)
    if workflow_id is None and latest:
        return latest[0]
    if workflow_id is None:
        msg = "there is no orchestration yet; start one with: sandbox-pipeline demo"
        raise ConfigError(msg)
    names = ", ".join(item.workflow_id for item in latest) or "none yet"
    msg = f"WORKFLOW: no orchestration {workflow_id!r}; the latest are: {names}"
    raise ConfigError(msg)


async def find_fork(
    runtime: Runtime, workflow_id: str | None, fork_num: int
) -> tuple[Orchestration, Fork]:
    """A fork of this orchestration, or of the latest.

    Raises:
        ConfigError: there is no such orchestration or fork.
    """
    orchestration = await find_orchestration(runtime, workflow_id)
    forks = await runtime.store.forks(orchestration.workflow_id)
    return orchestration, fork_of(forks, fork_num)
