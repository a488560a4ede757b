"""Whole runs on both kinds of sandboxes, counted by what provider and machine really did."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests.processes import live_sandboxes
from tests.real_runs import wire
from tests.servers.e2b_server import Limits

FORKS = 25
MAX_CONCURRENT = 6


@dataclass
class Observed:
    """Local sandboxes as this machine's processes tell: their start is the kernel's."""

    started: dict[str, float] = field(default_factory=dict[str, float])
    most_alive: int = 0

    def look(self, home: Path) -> None:
        alive = 0
        for process in psutil.process_iter(["cmdline", "create_time"]):
            with contextlib.suppress(psutil.Error):
                line = " ".join(process.info["cmdline"] or [])
                found = re.search(r"local-[a-z0-9-]+", line)
                if "supervisor.py" in line and str(home) in line and found:
                    begun = self.started.get(found[0], float("inf"))
                    self.started[found[0]] = min(begun, process.info["create_time"])
        alive = len(live_sandboxes(home))
        self.most_alive = max(self.most_alive, alive)

    def most_started_in(self, window_seconds: float) -> int:
        times = sorted(self.started.values())
        return max(sum(0 <= other - one < window_seconds for other in times) for one in times)


@asynccontextmanager
async def observing(home: Path) -> AsyncGenerator[Observed]:
    observed = Observed()

    async def watch() -> None:
        while True:
            await asyncio.to_thread(observed.look, home)
            await asyncio.sleep(0.03)

    watching = asyncio.create_task(watch())
    try:
        yield observed
    finally:
        watching.cancel()


def arguments(repo: Path, provider: str) -> list[str]:
    line = ["--repo", str(repo), "--prompt", "p", "--provider", provider, "--forks", str(FORKS)]
    line += ["--max-concurrent", str(MAX_CONCURRENT)]
    return [*line, "--command", "sh -c 'sleep 1; echo {fork_num} > made'"]


async def test_twenty_five_forks_on_e2b_by_its_ledger(home: Path, tmp_path: Path) -> None:
    limits = Limits(concurrent=MAX_CONCURRENT)
    async with wire(tmp_path, "e2b", "command", limits=limits) as servers:
        code, result = await servers.run(*arguments(servers.repo, "e2b"))
        assert (code, {row["outcome"] for row in result["forks"]}) == (0, {"success"}), result
        assert servers.cloud is not None
        ledger = servers.cloud.ledger
        assert len(ledger.created()) == len(set(ledger.created())) == FORKS
        assert {entry.sandbox_id for entry in ledger.entries("killed")} == set(ledger.created())
        assert len(ledger.entries("killed")) == FORKS
        assert ledger.live() == []
        assert 2 <= ledger.max_live() <= MAX_CONCURRENT
        assert ledger.most_creates_in(1.0) <= 5
        assert len(ledger.requests("POST", "/v2/sandboxes")) == FORKS, "no create was wasted"


async def test_twenty_five_forks_here_by_the_processes_of_the_machine(
    home: Path, tmp_path: Path
) -> None:
    async with wire(tmp_path, "local", "command") as servers, observing(home) as observed:
        code, result = await servers.run(*arguments(servers.repo, "local"))
        assert (code, {row["outcome"] for row in result["forks"]}) == (0, {"success"}), result
        assert len(observed.started) == FORKS
        assert set(observed.started) == {row["sandbox_id"] for row in result["forks"]}
        assert live_sandboxes(home) == []
        assert 2 <= observed.most_alive <= MAX_CONCURRENT
        assert observed.most_started_in(1.0) <= 5
        assert [path.name for path in (home / "sandboxes").glob("local-*")] == []


async def test_prepared_once_and_copied_then_removed(home: Path, tmp_path: Path) -> None:
    """On both providers: one setup for all forks, and nothing of it is left at the end."""
    for provider in ("local", "e2b"):
        async with wire(tmp_path / provider, provider, "command") as servers:
            line = ["--repo", str(servers.repo), "--prompt", "p", "--provider", provider]
            line += ["--forks", "4", "--setup-command", "echo once >> ../setup; sleep 2"]
            line += ["--command", "cp ../setup seen", "--workflow-id", f"prepared-{provider}"]
            code, result = await servers.run(*line)
            rows = result["forks"]
            assert (code, [row["insertions"] for row in rows]) == (0, [1] * 4), rows
            assert all(row["create_seconds"] < 2 for row in rows), "no fork waits for the setup"
            assert list((home / "sandboxes").glob("bases/*")) == []
            if servers.cloud is not None:
                ledger = servers.cloud.ledger
                assert len(ledger.entries("snapshot")) == 1
                assert len(ledger.entries("snapshot-deleted")) == 1
                assert len(ledger.created()) == 5
                assert all(row["cpu_seconds"] is not None for row in rows), json.dumps(rows)
                assert all(row["peak_memory_mb"] > 1 for row in rows)
