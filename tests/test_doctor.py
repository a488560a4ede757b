"""What `doctor` finds of providers, agents, keys and models, by real requests."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.checks import Check
from sandbox_pipeline.config import parse_config
from sandbox_pipeline.conformance.bench import CANARY
from sandbox_pipeline.diagnosis import diagnose
from sandbox_pipeline.runtime import Runtime
from tests.agents.test_claude_code import CLAUDE, needs_claude
from tests.servers.e2b_server import E2BServer
from tests.servers.messages_server import MessagesServer

MODELS = {"claude-sonnet-5-5", "claude-own-1"}


@asynccontextmanager
async def doctor(home: Path, environ: dict[str, str]) -> AsyncGenerator[Any, None]:
    runtime = Runtime.open(home=home, environ={"PATH": os.environ["PATH"], **environ})

    async def ask(**fields: Any) -> dict[str, list[Check]]:
        data = {"prompt": "p", "repo_url": "demo", **fields}
        found: dict[str, list[Check]] = {}
        for check in await diagnose(runtime, parse_config(data)):
            found.setdefault(check.name, []).append(check)
        assert CANARY not in str(found)
        return found

    try:
        yield ask
    finally:
        await runtime.close()


async def test_key_and_model_are_asked_of_the_api(home: Path) -> None:
    async with MessagesServer(key=CANARY, known_models=MODELS) as server:
        environ = {"ANTHROPIC_API_KEY": CANARY, "ANTHROPIC_BASE_URL": server.url}
        async with doctor(home, environ) as ask:
            found = await ask(agent={"kind": "anthropic"}, sandbox={"provider": "local"})
            assert [check.state for check in found["model API"]] == ["ok"]
            assert "ANTHROPIC_API_KEY is accepted" in found["model API"][0].finding
            assert found["model"][0].finding == "sonnet means claude-sonnet-5-5"
            [unknown] = (await ask(agent={"kind": "anthropic"}, model="gpt-9"))["model"]
            assert unknown.state == "failed"
            assert "sonnet, opus, haiku, claude-own-1, claude-sonnet-5-5" in unknown.finding
            [unpriced] = (await ask(agent={"kind": "anthropic"}, model="claude-own-1"))["model"]
            assert (unpriced.state, "price is not known" in unpriced.finding) == ("warning", True)
            assert not server.answers, "nothing was paid for"
            server.key = "another"
            [refused] = (await ask(agent={"kind": "anthropic"}))["model API"]
            assert refused.state == "failed"
            assert "ANTHROPIC_API_KEY is refused: 401 invalid x-api-key" in refused.finding


async def test_the_judges_key_and_model_are_asked_too(home: Path) -> None:
    fields: dict[str, Any] = {"agent": {"command": "true"}, "sandbox": {"provider": "local"}}
    async with MessagesServer(key=CANARY, known_models=MODELS) as server:
        environ = {"ANTHROPIC_API_KEY": CANARY, "ANTHROPIC_BASE_URL": server.url}
        async with doctor(home, environ) as ask:
            assert "judge: model" not in await ask(**fields)
            found = await ask(**fields, judge={"enabled": True, "model": "gpt-9"})
            assert [check.state for check in found["judge: model API"]] == ["ok"]
            [model] = found["judge: model"]
            assert (model.state, model.remedy) == ("failed", "change judge.model")
            assert not server.answers, "nothing was paid for"
    async with doctor(home, {}) as ask:
        [check] = (await ask(**fields, judge={"enabled": True}))["judge: model API"]
        assert (check.state, "ANTHROPIC_API_KEY" in check.remedy) == ("failed", True)


async def test_missing_key_and_missing_network_are_told_apart(home: Path) -> None:
    async with doctor(home, {}) as ask:
        [check] = (await ask(agent={"kind": "anthropic"}))["model API"]
        assert check.state == "failed"
        assert check.remedy.startswith("export ANTHROPIC_API_KEY=")
    environ = {"ANTHROPIC_API_KEY": CANARY, "ANTHROPIC_BASE_URL": "http://127.0.0.1:9"}
    async with doctor(home, environ) as ask:
        [check] = (await ask(agent={"kind": "anthropic"}))["model API"]
        assert (check.state, "can't be reached" in check.finding) == ("failed", True)


async def test_subscription_token_is_not_sent_to_the_api(home: Path) -> None:
    async with MessagesServer() as server:
        environ = {"CLAUDE_CODE_OAUTH_TOKEN": CANARY, "ANTHROPIC_BASE_URL": server.url}
        async with doctor(home, environ) as ask:
            found = await ask(agent={"kind": "claude_code"}, sandbox={"provider": "local"})
            assert found["model API"][0].state == "ok"
            assert server.ledger == []


async def test_missing_claude_code_is_one_line_with_its_remedy(home: Path) -> None:
    async with doctor(home, {"PATH": "/usr/bin", "ANTHROPIC_API_KEY": CANARY}) as ask:
        agent = {"kind": "claude_code", "claude_binary": "/nowhere/claude"}
        found = await ask(agent=agent, sandbox={"provider": "local"})
        assert found["Claude Code"][0].state == "failed"
        assert found["Claude Code"][0].remedy.startswith("npm install -g")
        assert "agent claude_code" not in found


@needs_claude
async def test_claude_code_is_told_with_its_version(home: Path) -> None:
    async with doctor(home, {"ANTHROPIC_API_KEY": CANARY}) as ask:
        agent = {"kind": "claude_code", "claude_binary": CLAUDE}
        [check] = (await ask(agent=agent, sandbox={"provider": "local"}))["Claude Code"]
        assert check.state == "ok"
        assert check.finding.startswith("2.")


async def test_e2b_key_template_and_plan(home: Path) -> None:
    async with E2BServer() as server:
        agent = {"command": "true"}
        async with doctor(home, dict(server.environ)) as ask:
            found = await ask(agent=agent, num_forks=30, max_concurrent=30)
            assert [check.state for check in found["E2B_API_KEY"]] == ["ok", "ok"]
            assert found["E2B template 'claude'"][0].state == "ok"
            warnings = [check for check in found["plan"] if check.state == "warning"]
            assert [check.finding.rpartition(": ")[2] for check in warnings] == [
                "20 sandboxes at once",
                "1 start a second",
                "a sandbox's life of 1 h",
            ]
            assert all(check.remedy for check in warnings)
            found = await ask(agent=agent, sandbox={"provider": "e2b", "template": "no-such"})
            assert found["E2B template 'no-such'"][0].state == "failed"
        environ = {**server.environ, "E2B_API_KEY": "e2b_wrong"}
        async with doctor(home, environ) as ask:
            found = await ask(agent=agent, sandbox={"provider": "e2b"})
            assert [check.state for check in found["E2B_API_KEY"]] == ["ok", "failed"]
    async with doctor(home, {"E2B_API_KEY": "x", "E2B_DEBUG": "true"}) as ask:
        [check] = (await ask(agent=agent, sandbox={"provider": "e2b"}))["provider e2b"]
        assert (check.state, "E2B_DEBUG" in check.finding) == ("failed", True)


@pytest.mark.parametrize("isolation", ["bubblewrap", "none"])
async def test_local_isolation_is_checked(home: Path, isolation: str) -> None:
    async with doctor(home, {}) as ask:
        sandbox = {"provider": "local", "isolation": isolation}
        [check] = (await ask(agent={"command": "true"}, sandbox=sandbox))["isolation"]
        assert check.state == ("ok" if isolation == "bubblewrap" else "warning")
