"""The contract of agents, applied to each that is shipped."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.agents import anthropic_sdk
from sandbox_pipeline.agents.anthropic_sdk import AnthropicAgent
from sandbox_pipeline.agents.base import Agent, Task
from sandbox_pipeline.agents.claude_code import ClaudeCodeAgent
from sandbox_pipeline.agents.command import CommandAgent
from sandbox_pipeline.agents.detached import Job, run_detached
from sandbox_pipeline.config import AgentConfig
from sandbox_pipeline.conformance.agents import AgentConformance, Scene
from sandbox_pipeline.conformance.bench import CANARY, bench
from sandbox_pipeline.errors import FailureClass
from sandbox_pipeline.records import AgentResult, Outcome
from sandbox_pipeline.sandboxes.base import Network, Sandbox
from sandbox_pipeline.testing import FakeAgent
from tests.agents.test_claude_code import CLAUDE, needs_claude
from tests.servers.messages_server import Fault, MessagesServer, Reply, ToolCall, say, steps


class TestCommand(AgentConformance):
    @asynccontextmanager
    async def at_work(
        self, tmp_path: Path, script: str, *, fails: bool = False, **fields: Any
    ) -> AsyncGenerator[Scene, None]:
        script = f"seq 100; {script}" + ("; exit 3" if fails else "")
        config = AgentConfig.model_validate({"command": ["sh", "-c", script], **fields})
        environ = {"ANTHROPIC_API_KEY": CANARY}
        async with bench(tmp_path, CommandAgent(), config, environ) as made:
            yield Scene(CommandAgent(), made, config)


class _ModelConformance(AgentConformance):
    """Of agents whose model is scripted to use its shell once."""

    agent: Agent
    shell: str
    network: Network
    fields: dict[str, Any]

    @asynccontextmanager
    async def at_work(
        self, tmp_path: Path, script: str, *, fails: bool = False, **fields: Any
    ) -> AsyncGenerator[Scene, None]:
        end = Reply(fault=Fault(status=400, message="no more")) if fails else say("All done.")
        model = steps(say("Working.", ToolCall(self.shell, {"command": script})), end)
        config = AgentConfig.model_validate({"kind": self.agent.kind, **self.fields, **fields})
        async with MessagesServer(script=model, key=CANARY) as server:
            environ = {"ANTHROPIC_API_KEY": CANARY, "ANTHROPIC_BASE_URL": server.url}
            async with bench(tmp_path, self.agent, config, environ, network=self.network) as made:
                yield Scene(self.agent, made, config)


@needs_claude
class TestClaudeCode(_ModelConformance):
    agent = ClaudeCodeAgent()
    shell = "Bash"
    network = "model_api"
    # Until it is followed again, nobody answers it: it has to try for that long.
    fields = {"claude_binary": CLAUDE, "env": {"CLAUDE_CODE_MAX_RETRIES": "10"}}  # noqa: RUF012


class TestAnthropic(_ModelConformance):
    agent = AnthropicAgent()
    shell = "bash"
    network = "none"
    fields = {}  # noqa: RUF012

    @pytest.fixture(autouse=True)
    def short_pauses(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(anthropic_sdk, "FIRST_PAUSE_SECONDS", 0.02)


class TestFake(AgentConformance):
    @asynccontextmanager
    async def at_work(
        self, tmp_path: Path, script: str, *, fails: bool = False, **fields: Any
    ) -> AsyncGenerator[Scene, None]:
        async def work(sandbox: Sandbox, task: Task) -> AgentResult:
            said: list[str] = []

            async def hear(_stream: str, chunk: bytes) -> None:
                said.append(chunk.decode())

            job = Job(["sh", "-c", script], task.config.timeout_seconds, 1_000_000)
            finished = await run_detached(sandbox, "fake", job, hear)
            if finished.timed_out:
                return AgentResult(outcome=Outcome.TIMEOUT, message="timeout_seconds is over")
            text = "".join(said)
            if fails:
                return AgentResult(
                    outcome=Outcome.FAILED,
                    failure_class=FailureClass.AGENT_FAILED,
                    message="as told",
                )
            return AgentResult(outcome=Outcome.SUCCESS, exit_code=0, message=text)

        agent = FakeAgent(work)
        config = AgentConfig.model_validate({"kind": "fake", **fields})
        async with bench(tmp_path, agent, config, {"ANTHROPIC_API_KEY": CANARY}) as made:
            yield Scene(agent, made, config)
