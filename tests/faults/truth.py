"""What must be true after every fault, by the provider's own ledger and the files on disk."""

from __future__ import annotations

import asyncio
import base64
import os
import urllib.parse
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from sandbox_pipeline.config import OrchestrationConfig, parse_config
from sandbox_pipeline.orchestrating import Completed
from sandbox_pipeline.records import Orchestration, orchestration_key
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.store import tables
from sandbox_pipeline.testing import drive
from tests.servers.e2b_server import E2BServer

CANARY = "canary+2b7e/1516 28aed2a6"
AGENT = 'sh -c \'echo run >> runs; echo "$CANARY"; echo "$CANARY" >&2; echo "$CANARY" > leak\''


def fields(repo: Path, **changes: Any) -> OrchestrationConfig:
    """A small orchestration at E2B whose agent prints a secret wherever it can."""
    data: dict[str, Any] = {
        "repo_url": str(repo),
        "prompt": "do it",
        "num_forks": 2,
        "agent": {"command": AGENT, "env_from": ["CANARY"], "timeout_seconds": 30},
        "sandbox": {"provider": "e2b", "orphan_grace_seconds": 30},
        "retry": {"initial_seconds": 0.01, "max_seconds": 3},
        "rate_limit": {"starts": 1000, "window_ms": 1},
    }
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(data.get(name), dict)
        data[name] = {**data[name], **value} if both else value
    return parse_config(data)


@asynccontextmanager
async def opened(home: Path, environ: Mapping[str, str]) -> AsyncGenerator[Runtime]:
    """A deployment that knows the secret."""
    runtime = Runtime.open(home=home, environ={**os.environ, **environ, "CANARY": CANARY})
    try:
        yield runtime
    finally:
        await runtime.close()


async def driven(
    server: E2BServer, home: Path, config: OrchestrationConfig, workflow_id: str = "w"
) -> Completed:
    """Run it to its end and check what must hold whatever happened."""
    async with opened(home, server.environ) as runtime:
        done = await drive(runtime, config, workflow_id)
        await check(runtime, home, config.num_forks, workflow_id)
    assert server.ledger.live(workflow_id=workflow_id) == []
    return done


async def check(runtime: Runtime, home: Path, num_forks: int, workflow_id: str = "w") -> None:
    """One row a fork, every fork ended, no secret anywhere."""
    rows = await runtime.store.rows(tables.fork_metrics, workflow_id)
    assert [row["fork_num"] for row in rows] == list(range(num_forks))
    forks = await runtime.store.forks(workflow_id)
    assert all(fork.outcome.is_terminal for fork in forks)
    stored = await runtime.store.need(Orchestration, orchestration_key(workflow_id))
    assert stored.completed_at is not None
    for fork in forks:
        if fork.patch is not None and fork.patch.path is not None:
            patch = await asyncio.to_thread(Path(fork.patch.path).read_text, "utf-8")
            assert patch.count("+run\n") <= 1, "the agent ran twice in one sandbox"
    assert secrets_in(home) == []


def secrets_in(home: Path, secret: str = CANARY) -> list[Path]:
    """Files of the deployment with the secret, plain, quoted or in base64."""
    needles = [secret.encode(), urllib.parse.quote(secret, safe="").encode()]
    needles += [base64.b64encode(b"x" * n + secret.encode())[4:-4] for n in range(3)]
    return [
        path
        for path in home.rglob("*")
        if path.is_file() and any(needle in path.read_bytes() for needle in needles)
    ]
