"""What every agent must do; a subclass supplies `at_work` and pytest runs it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.agents.base import Agent, Task
from sandbox_pipeline.agents.transcript import read_transcript
from sandbox_pipeline.config import AgentConfig
from sandbox_pipeline.conformance.bench import CANARY, Bench, Listener, files_with_secret
from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.records import AgentResult, Outcome
from sandbox_pipeline.sandboxes.local import LocalProvider

PROMPT = "Do the work, héllo."


@dataclass
class Scene:
    """An agent about to work in a sandbox.

    Attributes:
        fields: the configuration.
    """

    agent: Agent
    bench: Bench
    fields: AgentConfig

    async def task(self) -> Task:
        return await self.bench.task(self.fields, prompt=PROMPT)

    async def run(self, listener: Listener | None = None) -> AgentResult:
        """Run, or go on following."""
        return await self.agent.run(self.bench.sandbox, await self.task(), listener or Listener())


class AgentConformance:
    """The contract of `Agent`, as tests.

    A subclass supplies `at_work`: an agent that runs this shell script in the workspace and then
    is done, or then fails; `fields` are those of `agent`.
    """

    def at_work(
        self, tmp_path: Path, script: str, *, fails: bool = False, **fields: Any
    ) -> AbstractAsyncContextManager[Scene]:
        raise NotImplementedError

    async def test_work_is_a_success_with_a_result(self, tmp_path: Path) -> None:
        async with self.at_work(tmp_path, "echo made > made.txt") as scene:
            listener = Listener()
            result = await scene.run(listener)
            assert result.outcome is Outcome.SUCCESS, result
            assert result.failure_class is None
            assert result.exit_code in (0, None)
            assert (await scene.bench.sh("cat made.txt")).stdout == b"made\n"
            assert listener.lines, "it tells how it is doing"
            assert all(len(line) < 1000 for line in listener.lines)

    async def test_what_is_unknown_is_none_and_never_nought(self, tmp_path: Path) -> None:
        async with self.at_work(tmp_path, "true") as scene:
            result = await scene.run()
            assert (result.usage.cost_usd is None) is (result.cost_basis == "unknown")
            assert result.cost_basis in ("reported", "computed", "unknown")
            assert result.usage.cost_usd != 0
            assert all(count != 0 for count in (result.usage.input_tokens, result.turns))

    async def test_failure_is_a_result_and_keeps_the_work(self, tmp_path: Path) -> None:
        async with self.at_work(tmp_path, "echo half > half.txt", fails=True) as scene:
            result = await scene.run()
            assert result.outcome is Outcome.FAILED
            assert result.failure_class is not None
            assert result.message
            assert (await scene.bench.sh("cat half.txt")).stdout == b"half\n"

    async def test_time_limit_ends_it_and_keeps_the_work(self, tmp_path: Path) -> None:
        script = "echo half > half.txt; sleep 60"
        async with self.at_work(tmp_path, script, timeout_seconds=3) as scene:
            began = time.monotonic()
            result = await scene.run()
            assert result.outcome is Outcome.TIMEOUT, result
            assert "timeout_seconds" in result.message
            assert time.monotonic() - began < 20
            kept = await scene.bench.sh("cat half.txt")
            assert kept.stdout == b"half\n", kept

    async def test_second_run_follows_the_first_and_works_only_once(self, tmp_path: Path) -> None:
        """As after a crash: whoever followed it is gone, and somebody else asks again."""
        async with self.at_work(tmp_path, "echo ran >> ran.txt; sleep 3; echo end") as scene:
            first = asyncio.create_task(scene.run())
            deadline = time.monotonic() + 30
            while (await scene.bench.sh("test -e ran.txt")).exit_code != 0:
                assert time.monotonic() < deadline
                await asyncio.sleep(0.05)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await first
            result = await scene.run()
            assert result.outcome is Outcome.SUCCESS, result
            again = await scene.run()
            assert (again.outcome, again.usage) == (result.outcome, result.usage)
            assert (await scene.bench.sh("cat ran.txt")).stdout == b"ran\n"

    async def test_transcript_has_the_schema(self, tmp_path: Path) -> None:
        async with self.at_work(tmp_path, "echo something") as scene:
            await scene.run()
            entries = read_transcript(scene.bench.artifacts / "transcript.jsonl")
            assert (entries[0].type, entries[0].text) == ("prompt", PROMPT)
            assert len(entries) > 1
            times = [entry.time for entry in entries]
            assert times == sorted(times)
            called = {entry.tool_use_id for entry in entries if entry.type == "tool_use"}
            answered = {entry.tool_use_id for entry in entries if entry.type == "tool_result"}
            assert answered <= called

    async def test_secret_that_is_printed_is_in_no_artifact(self, tmp_path: Path) -> None:
        script = f"echo key={CANARY}; printf x%s {CANARY} | base64 -w0"
        async with self.at_work(tmp_path, script) as scene:
            result = await scene.run()
            assert result.secret_leak
            assert CANARY not in result.message
            assert files_with_secret(scene.bench.artifacts) == []

    async def test_lost_sandbox_is_the_providers_error(self, tmp_path: Path) -> None:
        async with self.at_work(tmp_path, "echo waits > waits.txt; sleep 60") as scene:
            working = asyncio.create_task(scene.run())
            await asyncio.sleep(1)
            await LocalProvider(tmp_path / "sandboxes").kill(scene.bench.sandbox.sandbox_id)
            with pytest.raises(ProviderError) as caught:
                await working
            assert caught.value.kind is ErrorKind.GONE

    async def test_it_says_what_it_needs(self, tmp_path: Path) -> None:
        async with self.at_work(tmp_path, "true") as scene:
            scene.agent.validate(scene.fields, scene.bench.environ, provider="local")
            assert scene.agent.network in ("none", "model_api", "full")
            mounts = scene.agent.mounts(scene.fields, scene.bench.environ)
            assert all(Path(source).exists() for source in mounts)
            assert all(target.startswith("/") for target in mounts.values())
