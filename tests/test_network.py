"""What a local sandbox may reach: nothing, but for `setup_command` where that was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from sandbox_pipeline.agents.base import Task
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.records import AgentResult, Outcome
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import WORKSPACE, Command, Sandbox
from sandbox_pipeline.testing import FakeAgent, drive

CONNECT = "import socket; socket.create_connection(('127.0.0.1', {port}), 2).close()"


async def test_the_network_of_the_setup_is_closed_again_before_the_agent(
    runtime: Runtime, config: Callable[..., OrchestrationConfig]
) -> None:
    reached: list[int] = []

    async def hello(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reached.append(1)
        writer.close()

    server = await asyncio.start_server(hello, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    script = CONNECT.format(port=port)

    async def connect(sandbox: Sandbox, task: Task) -> AgentResult:
        tried = await sandbox.run(Command(["python3", "-c", script], cwd=WORKSPACE))
        return AgentResult(outcome=Outcome.SUCCESS, exit_code=tried.exit_code)

    runtime._agents["fake"] = FakeAgent(connect)
    setup = f'python3 -c "{script}"'
    sandbox = {"provider": "local", "setup_network": "full"}
    done = await drive(runtime, config(num_forks=1, setup_command=setup, sandbox=sandbox), "w")
    assert done.error is None
    assert [row["exit_code"] for row in done.rows] == [1], "the agent must not connect"
    assert reached == [1], "the setup did"
    server.close()
    await server.wait_closed()
