"""Time to N ready sandboxes with a 10 s `setup_command`: prepared once, or by each fork.

`python -m benchmarks.prepare_once` measures local sandboxes, and E2B's SDK against the test
server, whose snapshots are copies of a folder: hosted E2B has its own figures.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from sandbox_pipeline.config import parse_config
from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.records import Event
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import SandboxProvider
from sandbox_pipeline.sandboxes.e2b import E2BProvider
from sandbox_pipeline.sandboxes.local import LocalProvider
from sandbox_pipeline.settings import Settings
from sandbox_pipeline.store import Store
from sandbox_pipeline.testing import FakeAgent, Fault, FaultyProvider, drive
from tests.servers.e2b_server import E2BServer

SETUP_SECONDS = 10
FORKS = (1, 5, 10)


async def seconds_until_ready(home: Path, name: str, made: SandboxProvider, forks: int) -> float:
    """From the request to the last fork's healthy sandbox."""
    settings = Settings.from_environ({}, home=home)
    providers: Mapping[str, SandboxProvider] = {name: made}
    store = Store.open(settings.db_url)
    runtime = Runtime(
        store, settings, dict(os.environ), providers=providers, agents={"fake": FakeAgent()}
    )
    config = parse_config(
        {
            "prompt": "p",
            "num_forks": forks,
            "max_concurrent": forks,
            "setup_command": f"sleep {SETUP_SECONDS}; echo ready > ../ready",
            "agent": {"kind": "fake"},
            "sandbox": {"provider": name},
        }
    )
    events: list[Event] = []
    began = time.time()
    done = await drive(runtime, config, f"{name}-{forks}", events=events)
    await runtime.close()
    ready = [event.time for event in events if event.name == "health-check-passed"]
    if len(ready) != forks or done.error is not None:
        msg = f"{len(ready)} of {forks} forks got ready: {done.error}"
        raise RuntimeError(msg)
    return max(ready) - began


async def measure(home: Path, name: str, made: SandboxProvider) -> None:
    """Print one row a number of forks."""
    for forks in FORKS:
        once = await seconds_until_ready(home / f"once-{forks}", name, made, forks)
        cannot = ProviderError(ErrorKind.INVALID, "made to have no snapshots")
        plain = FaultyProvider(made, [Fault("snapshot", cannot)])
        each = await seconds_until_ready(home / f"each-{forks}", name, plain, forks)
        print(f"| {name} | {forks} | {once:.1f} s | {each:.1f} s |", flush=True)


async def main() -> None:
    """Measure both providers."""
    print(f"| provider | forks | prepared once | setup of {SETUP_SECONDS} s in each fork |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        await measure(Path(folder) / "local", "local", LocalProvider(Path(folder) / "sandboxes"))
        async with E2BServer() as server:
            provider = E2BProvider.from_environ(server.environ)
            await measure(Path(folder) / "e2b", "e2b", provider)


if __name__ == "__main__":
    asyncio.run(main())
