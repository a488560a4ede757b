"""What the tests of agents share: a sandbox with a repository, a task, a listener."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sandbox_pipeline.agents.base import EXCHANGE_DIR, Agent, Task
from sandbox_pipeline.config import AgentConfig, SandboxConfig
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.sandboxes.base import (
    STATE_DIR,
    WORKSPACE,
    Command,
    CommandResult,
    Network,
    Sandbox,
    SandboxSpec,
)
from sandbox_pipeline.sandboxes.local import LocalProvider

CANARY = "sk-canary7f3a9c52e1d84b60d4e19f0"
"""A secret that may be found nowhere."""


@dataclass
class Listener:
    """A reporter that remembers."""

    lines: list[str] = field(default_factory=list[str])
    costs: list[float | None] = field(default_factory=list[float | None])

    async def progress(self, text: str, *, cost_usd: float | None = None) -> None:
        self.lines.append(text)
        self.costs.append(cost_usd)

    async def event(self, name: str, payload: Mapping[str, Any]) -> None:
        self.lines.append(name)


@dataclass
class Bench:
    """One sandbox with a repository, and what a task in it needs."""

    sandbox: Sandbox
    artifacts: Path
    exchange: Path
    environ: dict[str, str]

    async def sh(self, script: str) -> CommandResult:
        """Run a shell script in the workspace."""
        return await self.sandbox.run(Command(["sh", "-c", script], cwd=WORKSPACE))

    async def task(
        self,
        config: AgentConfig,
        *,
        prompt: str = "do it",
        model: str = "sonnet",
        fork_num: int = 0,
    ) -> Task:
        path = f"{STATE_DIR}/prompt.txt"
        await self.sandbox.write(path, prompt.encode())
        self.artifacts.mkdir(exist_ok=True)
        return Task(
            workflow_id="w",
            fork_num=fork_num,
            attempt=1,
            prompt=prompt,
            prompt_path=path,
            model=model,
            config=config,
            artifacts=self.artifacts,
            environ=self.environ,
            redactor=Redactor.from_environ(self.environ),
            exchange_dir=self.exchange,
            network="model_api",
        )


@asynccontextmanager
async def bench(
    tmp_path: Path,
    agent: Agent,
    config: AgentConfig,
    environ: dict[str, str],
    *,
    network: Network = "model_api",
    lease_id: str = "lease-0",
) -> AsyncGenerator[Bench, None]:
    """A local sandbox with a small repository in it."""
    provider = LocalProvider(tmp_path / "sandboxes")
    exchange = tmp_path / f"exchange-{lease_id}"
    exchange.mkdir(mode=0o700)
    mounts = {str(exchange): EXCHANGE_DIR, **agent.mounts(config, environ)}
    sandbox = await provider.create(
        SandboxSpec(
            lease_id=lease_id,
            metadata={"app": "test"},
            ttl_seconds=300,
            network=network,
            config=SandboxConfig.model_validate({}),
            mounts=mounts,
        )
    )
    try:
        made = Bench(sandbox, tmp_path / f"artifacts-{lease_id}", exchange, environ)
        await made.sh(
            "git init -q . && echo 'def f(): return 1' > app.py && git add -A &&"
            " git -c user.name=t -c user.email=t@t commit -qm base"
        )
        yield made
    finally:
        await provider.kill(sandbox.sandbox_id)
        await provider.close()


def secret_forms(secret: str = CANARY) -> list[bytes]:
    """The secret as it may look: plain, and in base64 at each alignment."""
    forms = [secret.encode()]
    for offset in range(3):
        encoded = base64.b64encode(b"x" * offset + secret.encode())
        forms.append(encoded[4:-4])
    return forms


def files_with_secret(*folders: Path, secret: str = CANARY) -> list[Path]:
    """Files below the folders in which the secret is, in whatever form."""
    return [
        path
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(form in path.read_bytes() for form in secret_forms(secret))
    ]
