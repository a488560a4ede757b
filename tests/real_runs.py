"""What the tests of whole runs share: both providers, all agents, and what the servers saw."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox_pipeline.agents.claude_binary import native_program
from sandbox_pipeline.conformance.bench import CANARY
from tests.agents.model_api import cost, find_test_claude
from tests.conftest import make_repo
from tests.servers.e2b_server import E2BServer, Limits
from tests.servers.messages_server import (
    Ask,
    Charge,
    LedgerEntry,
    MessagesServer,
    Reply,
    Script,
    ToolCall,
    say,
)

MODEL_HOST = "model-api.test"
MODEL_URL_INSIDE = f"http://{MODEL_HOST}:8080"
FORK = re.compile(r"this is fork-(\d+)")
WHICH_FORK = "echo this is $(git config user.name)"
COMMAND_AGENT = """\
import json, os, subprocess, sys, urllib.request

def say(text):
    messages.append({"role": "user", "content": text})
    headers = {"content-type": "application/json", "x-api-key": os.environ["ANTHROPIC_API_KEY"]}
    body = {"model": sys.argv[1], "max_tokens": 100, "messages": messages}
    url = os.environ["MODEL_URL"] + "/v1/messages"
    request = urllib.request.Request(url, json.dumps(body).encode(), headers)
    answer = json.load(urllib.request.urlopen(request))
    messages.append({"role": "assistant", "content": answer["content"]})
    usage = answer["usage"]
    kinds = {"read": "cache_read_input_tokens", "write": "cache_creation_input_tokens"}
    cache = {name: usage[kind] for name, kind in kinds.items()}
    tokens = {"input": usage["input_tokens"], "output": usage["output_tokens"], "cache": cache}
    print(json.dumps({"type": "step_finish", "part": {"tokens": tokens}}), flush=True)
    return answer

messages = []
answer = say(open(sys.argv[2]).read())
while answer["stop_reason"] == "tool_use":
    command = answer["content"][-1]["input"]["command"]
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    call = {"type": "tool_result", "tool_use_id": answer["content"][-1]["id"]}
    answer = say([{**call, "content": done.stdout}])
"""


def charge_of(fork: int, turn: int) -> Charge:
    """What the scripted model charges; differs by fork and turn."""
    if turn == 0:
        return Charge(1000, 10, 300, 40)
    return Charge(100 * turn + fork, 20 + fork, 7 * fork, 1300 + turn)


def edits(ask: Ask) -> Reply:
    """A model that asks which fork it works for, edits a file accordingly, and is done."""
    names = {str(tool.get("name")) for tool in ask.body.get("tools", [])}
    shell = "Bash" if "Bash" in names else "bash"
    if ask.turn == 0:
        return say("Looking.", ToolCall(shell, {"command": WHICH_FORK}), charge=charge_of(0, 0))
    fork = fork_of(ask.body)
    if ask.turn == 1:
        command = f"echo 'def f(): return {fork}' > app.py; echo edited"
        tool = ToolCall(shell, {"command": command})
        return say("Editing.", tool, charge=charge_of(fork, 1))
    return say(f"Done in fork {fork}.", charge=charge_of(fork, 2))


def fork_of(body: Mapping[str, Any]) -> int:
    """The fork that a request came from, by what its tools told."""
    found = FORK.search(json.dumps(body))
    assert found is not None, "the model was not told its fork"
    return int(found[1])


def entries_of(fork: int, server: MessagesServer) -> list[LedgerEntry]:
    """Of the charged requests, those of one fork; any fork's first looks alike."""
    first = [entry for entry in server.answers if entry.turn == 0]
    later = [e for e in server.answers if e.turn and fork_of(e.body) == fork]
    return [first[0], *later]


@dataclass
class Wire:
    """The servers, and the environment that points the product to them.

    Attributes:
        cloud: None for the local provider.
    """

    provider: str
    model: MessagesServer
    cloud: E2BServer | None
    environ: dict[str, str]
    repo: Path

    def arguments(self, agent: str, *, forks: int = 5) -> list[str]:
        """Of `run`, for an agent on this provider."""
        settings = ["retry.initial_seconds=0.1", "agent.timeout_seconds=120"]
        line = ["--repo", str(self.repo), "--prompt", "Edit app.py.", "--forks", str(forks)]
        line += ["--provider", self.provider, "--agent", agent, "--model", "claude-sonnet-5-5"]
        if agent == "claude_code" and self.provider == "local":
            settings.append(f"agent.claude_binary={find_test_claude()}")
        if agent == "command":
            inside = MODEL_URL_INSIDE if self.cloud is not None else self.model.url
            line += ["--command", "python3 agent.py {model} {prompt_file}"]
            settings += ["agent.usage_format=opencode-jsonl", "sandbox.network=full"]
            settings += [f"agent.env.MODEL_URL={inside}", "agent.env_from=[ANTHROPIC_API_KEY]"]
        for item in settings:
            line += ["--set", item]
        return line

    async def run(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """`sandbox-pipeline run --json`; its exit code and what it printed."""
        code, out, err = await self.cli("run", "--json", *arguments)
        assert out, err
        return code, json.loads(out)

    async def cli(self, *arguments: str) -> tuple[int, str, str]:
        """The command line as its own process."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "sandbox_pipeline", *arguments),
            env={**os.environ, **self.environ},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await process.communicate()
        return process.returncode or 0, out.decode(), err.decode()


@asynccontextmanager
async def wire(
    tmp_path: Path,
    provider: str,
    agent: str,
    *,
    script: Script = edits,
    files: Mapping[str, str | bytes] | None = None,
    limits: Limits | None = None,
    claude: Path | None = None,
) -> AsyncGenerator[Wire, None]:
    """The servers for one test, with a repository to work on; `claude` is what E2B's image has."""
    repo = make_repo(
        tmp_path / "repo",
        {"app.py": "def f(): return None\n", "agent.py": COMMAND_AGENT, **(files or {})},
    )
    async with MessagesServer(script=script, key=CANARY) as model:
        # Where a model is asked from inside E2B's sandboxes, its name is known there only.
        inside = provider == "e2b" and agent == "claude_code"
        environ = {
            "ANTHROPIC_API_KEY": CANARY,
            "ANTHROPIC_BASE_URL": MODEL_URL_INSIDE if inside else model.url,
        }
        if provider == "local":
            yield Wire(provider, model, None, environ, repo)
            return
        here = find_test_claude()
        if claude is None and here is not None:
            claude = native_program(Path(here))
        programs = {"claude": claude} if claude is not None else {}
        internet = {MODEL_HOST: model.url}
        async with E2BServer(programs=programs, internet=internet, limits=limits) as cloud:
            yield Wire(provider, model, cloud, {**environ, **cloud.environ}, repo)
            assert cloud.ledger.live() == [], "sandboxes outlived the test"


def assert_charged(row: Mapping[str, Any], entries: list[LedgerEntry], *, basis: str) -> None:
    """A fork's tokens and cost are exactly those of the server's ledger."""
    total = Charge(0, 0, 0, 0)
    for entry in entries:
        assert entry.charge is not None
        total += entry.charge
    assert {name: row[name] for name in vars(total)} == vars(total)
    assert row["cost_basis"] == basis
    if basis != "unknown":
        assert abs(row["cost_usd"] - cost(entries)) < 1e-9
