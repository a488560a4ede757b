"""The SDK's tool loop, with its tools in a real bubblewrap sandbox, against a scripted API."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.agents import anthropic_sdk
from sandbox_pipeline.agents.anthropic_sdk import AnthropicAgent
from sandbox_pipeline.agents.models import PRICES
from sandbox_pipeline.agents.raw_answer import SHOWN_CHARS
from sandbox_pipeline.agents.sandbox_tools import MAX_ANSWER_CHARACTERS
from sandbox_pipeline.agents.transcript import read_transcript
from sandbox_pipeline.config import AgentConfig
from sandbox_pipeline.conformance.bench import CANARY, Bench, Listener, bench, files_with_secret
from sandbox_pipeline.errors import AgentError, ConfigError, FailureClass
from sandbox_pipeline.records import Outcome, Usage
from tests.agents.model_api import cost
from tests.servers.messages_server import (
    Ask,
    Charge,
    Fault,
    MessagesServer,
    Reply,
    Script,
    ToolCall,
    say,
    steps,
)

EDITOR = "str_replace_based_edit_tool"
EDITS = steps(
    say(
        "Looking.",
        ToolCall("bash", {"command": "cd /tmp && export WORD=kept"}),
        ToolCall("bash", {"command": "echo $WORD; pwd; exit 3"}),
        charge=Charge(1000, 50, 300, 20),
    ),
    say(
        "Editing.",
        ToolCall(
            EDITOR, {"command": "str_replace", "path": "app.py", "old_str": "1", "new_str": "2"}
        ),
        charge=Charge(5, 40, 100, 1300),
    ),
    say("All done.", charge=Charge(7, 30, 0, 1400)),
)


def agent_config(**fields: Any) -> AgentConfig:
    return AgentConfig.model_validate({"kind": "anthropic", "timeout_seconds": 60, **fields})


@asynccontextmanager
async def serving(
    tmp_path: Path, script: Script, config: AgentConfig, **server_fields: Any
) -> AsyncGenerator[tuple[MessagesServer, Bench], None]:
    async with MessagesServer(script=script, key=CANARY, **server_fields) as server:
        environ = {"ANTHROPIC_API_KEY": CANARY, "ANTHROPIC_BASE_URL": server.url}
        async with bench(tmp_path, AnthropicAgent(), config, environ, network="none") as made:
            yield server, made


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(anthropic_sdk, "FIRST_PAUSE_SECONDS", 0.02)


async def test_edits_the_repository_and_computes_what_the_server_charged(tmp_path: Path) -> None:
    config = agent_config(append_system_prompt="Added words.")
    async with serving(tmp_path, EDITS, config) as (server, made):
        listener = Listener()
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), listener)
        assert result.outcome is Outcome.SUCCESS, result
        assert (await made.sh("cat app.py")).stdout == b"def f(): return 2\n"
        charged = server.charged()
        assert result.usage.model_dump(exclude={"cost_usd"}) == vars(charged)
        assert result.usage.cost_usd == pytest.approx(cost(server.answers), rel=1e-12)
        assert result.cost_basis == "computed"
        assert (result.turns, result.message) == (3, "All done.")
        assert result.model == server.answers[0].model == "claude-sonnet-5-5"
        assert listener.lines[-1] == "turn 3, 4.3k tokens"
        assert "turn 2, str_replace_based_edit_tool, 2.8k tokens" in listener.lines
        assert listener.costs[-1] == pytest.approx(result.usage.cost_usd)
        assert server.answers[0].headers["accept-encoding"] == "identity"
        first = server.answers[0].body
        assert first["cache_control"] == {"type": "ephemeral"}
        assert first["stream"] is True
        assert "Added words." in first["system"]
        results = server.answers[1].body["messages"][-1]["content"]
        assert [block["is_error"] for block in results] == [False, True]
        assert results[1]["content"] == "kept\n/tmp\n\n[exit code 3]"
        types = [entry.type for entry in read_transcript(made.artifacts / "transcript.jsonl")]
        assert types == [
            *("prompt", "text", "tool_use", "tool_use", "tool_result", "tool_result"),
            *("text", "tool_use", "tool_result", "text", "result"),
        ]


async def test_editor_commands(tmp_path: Path) -> None:
    calls = [
        {"command": "create", "path": "/home/user/workspace/a/b.sh", "file_text": "one\ntwo"},
        {"command": "insert", "path": "a/b.sh", "insert_line": 2, "insert_text": "three"},
        {"command": "view", "path": "a/b.sh", "view_range": [2, -1]},
        {"command": "view", "path": "a"},
        {"command": "str_replace", "path": "a/b.sh", "old_str": "t", "new_str": "T"},
        {"command": "view", "path": "missing"},
        {"command": "undo_edit", "path": "a/b.sh"},
        {"command": "insert", "path": "a/b.sh", "insert_line": "x", "insert_text": ""},
        {"command": "view", "path": 7},
    ]
    script = steps(say("", *(ToolCall(EDITOR, call) for call in calls)), say("done"))
    config = agent_config()
    async with serving(tmp_path, script, config) as (server, made):
        await made.sh("mkdir a && touch a/b.sh && chmod +x a/b.sh")
        await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        answers = [block["content"] for block in server.answers[1].body["messages"][-1]["content"]]
        assert answers[2] == "2\ttwo\n3\tthree\n4\t"
        assert answers[3].split() == ["/home/user/workspace/a", "/home/user/workspace/a/b.sh"]
        assert "3 times" in answers[4] or "exactly once" in answers[4]
        assert "no such file" in answers[5]
        assert "no command 'undo_edit'" in answers[6]
        assert "whole number" in answers[7]
        assert answers[8] == "path must be a text"
        assert (await made.sh("cat a/b.sh; test -x a/b.sh")).stdout == b"one\ntwo\nthree\n"
        assert (await made.sh("test -x a/b.sh")).exit_code == 0


async def test_large_output_and_unknown_tools_are_bounded_answers(tmp_path: Path) -> None:
    script = steps(
        say(
            "",
            ToolCall("bash", {"command": "head -c 20000000 /dev/zero | tr '\\0' x"}),
            ToolCall("nothing", {}),
            ToolCall("bash", {"command": ["no", "text"]}),
            ToolCall("bash", {"restart": True}),
        ),
        say("done"),
    )
    config = agent_config()
    async with serving(tmp_path, script, config) as (server, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert result.outcome is Outcome.SUCCESS
        blocks = server.answers[1].body["messages"][-1]["content"]
        assert len(blocks[0]["content"]) <= MAX_ANSWER_CHARACTERS + 100
        assert "further output was dropped" in blocks[0]["content"]
        assert [block["content"] for block in blocks[1:]] == [
            "there is no tool 'nothing'",
            "command must be a text",
            "the shell starts anew",
        ]


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (Fault(status=401, message=f"bad key {CANARY}"), "401 authentication_error: bad key"),
        (Fault(status=404, message="model: x"), "404 not_found_error: model: x"),
        (Fault(status=400, body=b"<html>" + b"x" * 10_000_000), "400"),
        (Fault(status=429, headers={"retry-after": "120"}), "429 rate_limit_error"),
    ],
)
async def test_lasting_refusal_fails_without_retry(
    tmp_path: Path, fault: Fault, words: str
) -> None:
    config = agent_config()
    async with serving(tmp_path, EDITS, config, faults=[fault]) as (server, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert (result.outcome, result.failure_class) == (Outcome.FAILED, FailureClass.AGENT_FAILED)
        assert words in result.message
        assert len(result.message) < 2000
        assert len(server.answers) == 1
        assert result.usage.cost_usd is None
        assert result.cost_basis == "unknown"
        assert CANARY not in result.message
        assert files_with_secret(made.artifacts) == []


async def test_passing_faults_are_tried_again_and_told(tmp_path: Path) -> None:
    faults = [
        Fault(status=529),
        Fault(status=429, headers={"retry-after": "0.05"}),
        Fault(status=500),
        Fault(error_after_events=2),
        Fault(cut_after_events=2),
    ]
    config = agent_config()
    async with serving(tmp_path, EDITS, config, faults=faults) as (server, made):
        listener = Listener()
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), listener)
        assert result.outcome is Outcome.SUCCESS, result
        assert listener.lines.count("agent-retried") == 5
        assert result.usage.cost_usd == pytest.approx(cost(server.answers))


async def test_fault_that_does_not_pass_fails_with_its_reason(tmp_path: Path) -> None:
    config = agent_config()
    async with serving(tmp_path, EDITS, config, faults=[Fault(status=529)] * 20) as (server, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert (result.outcome, result.failure_class) == (Outcome.FAILED, FailureClass.AGENT_FAILED)
        assert "529 overloaded_error" in result.message
        assert len(server.answers) == anthropic_sdk.TRIES


def sse(*events: dict[str, Any]) -> bytes:
    return b"".join(f"event: {e['type']}\ndata: {json.dumps(e)}\n\n".encode() for e in events)


def begun(**message: Any) -> dict[str, Any]:
    fields = {"id": "m", "role": "assistant", "model": "claude-sonnet-5-5"}
    whole: dict[str, Any] = {"type": "message", "content": [], **fields, **message}
    return {"type": "message_start", "message": whole}


def block(index: int, **fields: Any) -> list[dict[str, Any]]:
    start = {"type": "content_block_start", "index": index, "content_block": fields}
    return [start, {"type": "content_block_stop", "index": index}]


def piece(index: int, text: str) -> dict[str, Any]:
    delta = {"type": "text_delta", "text": text}
    return {"type": "content_block_delta", "index": index, "delta": delta}


def ended(**usage: Any) -> list[dict[str, Any]]:
    delta = {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": usage}
    return [delta, {"type": "message_stop"}]


USAGE = {"input_tokens": 5, "output_tokens": 1}
TOOL = {"type": "tool_use", "name": "bash", "input": {"command": "touch ran"}}


@pytest.mark.parametrize(
    "body",
    [
        b"<html>sign in with " + CANARY.encode(),
        b"",
        b"event: message_start\ndata: {not json\n\n",
        b"event: message_start\ndata: []\n\n",
        sse({"type": "message_start"}),
        sse(begun(), *ended()),
        sse(piece(0, "first")),
        sse(begun(usage=USAGE), piece(7, "x"), *ended(output_tokens=1)),
        sse(begun(usage=USAGE), *block(0, **TOOL), *ended(output_tokens=1)),
        sse(begun(usage=USAGE), *block(0, type="text", text=None), *ended(output_tokens=1)),
        sse(begun(usage=USAGE), *[piece(0, "x" * 100_000)] * 500, *ended(output_tokens=1)),
    ],
    ids=[
        *("html", "empty", "no JSON", "list", "no message", "no usage", "no start", "no block"),
        *("tool without id", "text that is none", "50 MB"),
    ],
)
async def test_answer_that_is_none_is_a_bad_result_and_kept(tmp_path: Path, body: bytes) -> None:
    config = agent_config()
    headers = {"content-type": "text/html" if body[:1] == b"<" else "text/event-stream"}
    faults = [Fault(status=200, body=body, headers=headers)] * 20
    async with serving(tmp_path, EDITS, config, faults=faults) as (server, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert (result.outcome, result.failure_class) == (Outcome.FAILED, FailureClass.BAD_RESULT)
        assert "answer can't be read" in result.message
        assert len(result.message) < 500
        assert len(server.answers) == anthropic_sdk.TRIES
        assert (result.usage, result.cost_basis) == (Usage(), "unknown")
        assert (await made.sh("test -e ran")).exit_code == 1
        entries = read_transcript(made.artifacts / "transcript.jsonl")
        kept = [entry.text for entry in entries if entry.name == "model API"]
        assert len(kept) == anthropic_sdk.TRIES
        assert kept[0][:10] == body[:10].decode()
        assert len(kept[0]) <= SHOWN_CHARS
        assert files_with_secret(made.artifacts) == []
        assert CANARY not in result.message


async def test_answer_that_is_none_is_tried_again(tmp_path: Path) -> None:
    config = agent_config()
    faults = [Fault(status=200, body=b"<html>", headers={"content-type": "text/html"})]
    async with serving(tmp_path, EDITS, config, faults=faults) as (server, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert result.outcome is Outcome.SUCCESS, result
        assert result.usage.cost_usd == pytest.approx(cost(server.answers[1:]))


async def test_usage_that_is_negative_is_unknown(tmp_path: Path) -> None:
    config = agent_config()
    usage = {"input_tokens": -5, "output_tokens": -1}
    body = sse(begun(usage=usage), *block(0, type="text", text="hi"), *ended(output_tokens=-2))
    faults = [Fault(status=200, body=body, headers={"content-type": "text/event-stream"})]
    async with serving(tmp_path, EDITS, config, faults=faults) as (_, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert (result.outcome, result.message) == (Outcome.SUCCESS, "hi")
        assert (result.usage, result.cost_basis) == (Usage(), "unknown")


@pytest.mark.parametrize(
    "prompt",
    ["-leading \"double\" 'single' $(touch ran) `touch ran` \\ \n\r\n\tend", "é" * 100_000],
    ids=["odd", "200 kB"],
)
async def test_prompt_reaches_the_model_as_it_is(tmp_path: Path, prompt: str) -> None:
    config = agent_config()
    async with serving(tmp_path, steps(say("ok")), config) as (server, made):
        task = await made.task(config, prompt=prompt)
        await AnthropicAgent().run(made.sandbox, task, Listener())
        [message] = server.answers[0].body["messages"]
        assert [block["text"] for block in message["content"]] == [prompt]


async def test_turns_and_budget_are_limits(tmp_path: Path) -> None:
    config = agent_config(max_turns=2)
    async with serving(tmp_path, EDITS, config) as (server, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert (result.outcome, result.turns) == (Outcome.FAILED, 2)
        assert "agent.max_turns (2)" in result.message
        # The tools of the last answer ran, so that what was paid for is in the patch.
        assert (await made.sh("cat app.py")).stdout == b"def f(): return 2\n"
        assert len(server.answers) == 2


async def test_budget_is_a_limit(tmp_path: Path) -> None:
    config = agent_config(max_budget_usd=0.002)
    async with serving(tmp_path, EDITS, config) as (server, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert result.outcome is Outcome.BUDGET_EXCEEDED
        assert len(server.answers) == 1
        assert result.usage.cost_usd == pytest.approx(cost(server.answers))


async def test_time_out_keeps_usage_and_stays_one(tmp_path: Path) -> None:
    script = steps(say("", ToolCall("bash", {"command": "touch begun; sleep 30"})))
    config = agent_config(timeout_seconds=1.5)
    async with serving(tmp_path, script, config) as (server, made):
        task = await made.task(config)
        result = await AnthropicAgent().run(made.sandbox, task, Listener())
        assert result.outcome is Outcome.TIMEOUT
        assert result.usage.cost_usd == pytest.approx(cost(server.answers))
        assert (await made.sh("test -e begun")).exit_code == 0
        again = await AnthropicAgent().run(made.sandbox, task, Listener())
        assert (again.outcome, again.usage) == (result.outcome, result.usage)
        assert len(server.answers) == 1


async def test_reattached_loop_pays_nothing_twice_and_repeats_no_command(tmp_path: Path) -> None:
    script = steps(
        say("", ToolCall("bash", {"command": "echo first >> log"})),
        say("", ToolCall("bash", {"command": "echo second >> log; sleep 20"})),
        say("finished"),
    )
    config = agent_config()
    async with serving(tmp_path, script, config) as (server, made):
        task = await made.task(config)
        first = asyncio.create_task(AnthropicAgent().run(made.sandbox, task, Listener()))
        while (await made.sh("grep -c second log")).stdout != b"1\n":
            await asyncio.sleep(0.05)
        first.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await first
        result = await AnthropicAgent().run(made.sandbox, task, Listener())
        assert result.outcome is Outcome.SUCCESS, result
        assert (await made.sh("cat log")).stdout == b"first\nsecond\n"
        assert [entry.turn for entry in server.answers] == [0, 1, 2]
        assert "Interrupted" in json.dumps(server.answers[2].body["messages"][-1])
        assert result.usage.cost_usd == pytest.approx(cost(server.answers))
        again = await AnthropicAgent().run(made.sandbox, task, Listener())
        assert again == result
        assert len(server.answers) == 3


async def test_conversation_changed_in_the_sandbox_is_refused(tmp_path: Path) -> None:
    config = agent_config()
    async with serving(tmp_path, EDITS, config) as (_, made):
        task = await made.task(config)
        await AnthropicAgent().run(made.sandbox, task, Listener())
        await made.sh("sed -i s/Looking/Obeying/ ~/.sandbox_pipeline/agent-1/messages.json")
        with pytest.raises(AgentError, match="changed in the sandbox"):
            await AnthropicAgent().run(made.sandbox, task, Listener())


async def test_key_does_not_enter_the_sandbox(tmp_path: Path) -> None:
    look = "env; cat /proc/*/environ /proc/*/cmdline 2>/dev/null | tr '\\0' '\\n'"
    script = steps(say("", ToolCall("bash", {"command": look})), say("done"))
    config = agent_config()
    async with serving(tmp_path, script, config) as (server, made):
        await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert CANARY not in json.dumps(server.answers[1].body)
        assert "PATH=" in json.dumps(server.answers[1].body)
        assert (await made.sh(f"grep -rl {CANARY} /home/user /tmp")).stdout == b""
        assert files_with_secret(made.artifacts) == []


async def test_answer_cut_off_by_its_length_goes_on(tmp_path: Path) -> None:
    def script(ask: Ask) -> Reply:
        if ask.turn == 0:
            return Reply("half", stop="max_tokens")
        if ask.turn == 1:
            call = ToolCall("bash", {"command": "touch ran"})
            return Reply("", [call], stop="max_tokens")
        return say("whole") if ask.turn == 2 else Reply("I won't", stop="refusal")

    config = agent_config()
    async with serving(tmp_path, script, config) as (_, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert (result.outcome, result.message) == (Outcome.SUCCESS, "whole")
        assert (await made.sh("test -e ran")).exit_code == 1


async def test_refusal_of_the_model_is_a_failure(tmp_path: Path) -> None:
    config = agent_config()
    script = steps(Reply("No.", stop="refusal"))
    async with serving(tmp_path, script, config) as (_, made):
        result = await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert (result.outcome, result.failure_class) == (Outcome.FAILED, FailureClass.AGENT_FAILED)
        assert "refusal" in result.message


async def test_prices_come_from_the_file_that_the_environment_names(tmp_path: Path) -> None:
    prices = tmp_path / "prices.yaml"
    prices.write_text(
        "claude-mine: {input: 1000000, output: 0, cache_creation: 0, cache_read: 0}\n"
    )
    config = agent_config()
    async with serving(tmp_path, steps(say("ok", charge=Charge(3, 1))), config) as (_, made):
        task = await made.task(config, model="claude-mine")
        result = await AnthropicAgent().run(made.sandbox, task, Listener())
        assert (result.usage.input_tokens, result.usage.cost_usd) == (3, None)
    assert "claude-mine" not in PRICES
    second = tmp_path / "second"
    second.mkdir()
    async with serving(second, steps(say("ok", charge=Charge(3, 1))), config) as (_, made):
        made.environ["SANDBOX_PIPELINE_PRICES"] = str(prices)
        task = await made.task(config, model="claude-mine")
        result = await AnthropicAgent().run(made.sandbox, task, Listener())
        assert result.usage.cost_usd == 3.0


async def test_key_that_is_gone_is_an_error_of_the_fork(tmp_path: Path) -> None:
    config = agent_config()
    async with serving(tmp_path, EDITS, config) as (_, made):
        made.environ.clear()
        with pytest.raises(AgentError, match="ANTHROPIC_API_KEY") as caught:
            await AnthropicAgent().run(made.sandbox, await made.task(config), Listener())
        assert caught.value.failure_class is FailureClass.CONFIG


def test_missing_key_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="ANTHROPIC_API_KEY"):
        AnthropicAgent().validate(agent_config(), {"CLAUDE_CODE_OAUTH_TOKEN": "x"})
    AnthropicAgent().validate(agent_config(), {"ANTHROPIC_AUTH_TOKEN": "x"})
