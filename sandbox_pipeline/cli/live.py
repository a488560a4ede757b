"""Watches an orchestration while it runs: a live table on a terminal, plain lines elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import threading
from datetime import UTC, datetime
from types import TracebackType
from typing import IO, Self

from rich.console import Console
from rich.live import Live

from sandbox_pipeline.cli.tables import fork_table
from sandbox_pipeline.records import Event, Orchestration, orchestration_key
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.settings import default_home

REFRESH_SECONDS = 0.25
MAX_LIVE_ROWS = 40


class Watch:
    """Shows progress from a thread of its own while the block runs.

    Args:
        workflow_id: what to watch; may not exist yet.
        output: where to; a duplicate of the terminal made before the run redirects it.
        quiet: show nothing.
    """

    def __init__(self, workflow_id: str, output: IO[str], *, quiet: bool) -> None:
        self._workflow_id = workflow_id
        self._console = Console(file=output)
        self._quiet = quiet
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._watch()), name="watch")

    def __enter__(self) -> Self:
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over.set()
        if not self._quiet:
            self._thread.join()

    async def _watch(self) -> None:
        runtime = Runtime.open(home=default_home(os.environ))
        try:
            if self._console.is_terminal:
                await self._table(runtime)
            else:
                await self._lines(runtime)
        finally:
            await runtime.close()

    async def _table(self, runtime: Runtime) -> None:
        with Live(console=self._console, auto_refresh=False, transient=True) as live:
            while not self._over.is_set():
                await asyncio.sleep(REFRESH_SECONDS)
                orchestration = await runtime.store.get(
                    Orchestration, orchestration_key(self._workflow_id)
                )
                if orchestration is None:
                    live.update("starting …", refresh=True)
                    continue
                forks = await runtime.store.forks(self._workflow_id)
                shown = [fork for fork in forks if fork.started_at is not None][-MAX_LIVE_ROWS:]
                table = fork_table(orchestration, forks if len(forks) <= MAX_LIVE_ROWS else shown)
                live.update(table, refresh=True)

    async def _lines(self, runtime: Runtime) -> None:
        seen = 0
        while True:
            last = self._over.is_set()
            for event in await runtime.store.events(self._workflow_id, after_seq=seen):
                seen = event.seq
                self._console.print(
                    event_line(event), soft_wrap=True, markup=False, highlight=False
                )
            if last:
                return
            await asyncio.sleep(REFRESH_SECONDS)


def event_line(event: Event) -> str:
    """One event on one line."""
    at = datetime.fromtimestamp(event.time, UTC).strftime("%H:%M:%S.%f")[:-3]
    fork = "" if event.fork_num is None else f"fork {event.fork_num}"
    details = " ".join(f"{name}={json.dumps(value)}" for name, value in event.payload.items())
    return f"{at}  {fork:<9} {event.name:<24} {details}".rstrip()
