"""Claude Code's stream-json, also where it is hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.agents.claude_stream import ClaudeStream
from sandbox_pipeline.agents.models import Tokens
from sandbox_pipeline.agents.transcript import Entry, TranscriptWriter, read_transcript
from sandbox_pipeline.records import Usage
from sandbox_pipeline.redaction import Redactor

RESULT: dict[str, Any] = {
    "duration_ms": 5,
    "subtype": "success",
    "is_error": False,
    "num_turns": 3,
    "result": "done",
    "session_id": "s",
    "total_cost_usd": 0.5,
    "usage": {"input_tokens": 1, "output_tokens": 1},
    "modelUsage": {
        "a": {"inputTokens": 10, "outputTokens": 20, "cacheReadInputTokens": 30},
        "b": {"inputTokens": 1, "outputTokens": 2, "cacheReadInputTokens": "garbage"},
    },
    "type": "result",
}


def assistant(message_id: str, *blocks: dict[str, Any]) -> dict[str, Any]:
    return {"type": "assistant", "message": {"id": message_id, "content": list(blocks)}}


def read(tmp_path: Path, *events: Any) -> tuple[ClaudeStream, list[Entry]]:
    path = tmp_path / "transcript.jsonl"
    with TranscriptWriter(path, Redactor([])) as transcript:
        stream = ClaudeStream(transcript)
        for event in events:
            stream.line(event if isinstance(event, str) else json.dumps(event))
    return stream, read_transcript(path)


def test_result_counts_what_every_model_charged(tmp_path: Path) -> None:
    stream, entries = read(tmp_path, RESULT)
    assert stream.result is not None
    assert stream.result.report.usage == Usage(
        input_tokens=11,
        output_tokens=22,
        cache_creation_input_tokens=None,
        cache_read_input_tokens=30,
        cost_usd=0.5,
    )
    assert (stream.result.report.turns, stream.result.text) == (3, "done")
    assert entries[-1].data is not None
    assert entries[-1].data["session_id"] == "s"


def test_one_answer_in_several_events_is_one_turn(tmp_path: Path) -> None:
    tool = {"type": "tool_use", "id": "t", "name": "Edit", "input": {"a": 1}}
    answer = {
        "type": "tool_result",
        "tool_use_id": "t",
        "content": [{"type": "text", "text": "ok"}],
    }
    stream, entries = read(
        tmp_path,
        {"type": "system", "subtype": "init", "model": "m", "claude_code_version": "2.1"},
        assistant("1", {"type": "thinking", "thinking": "hm"}),
        assistant("1", {"type": "text", "text": "hello"}),
        assistant("1", tool),
        {"type": "user", "message": {"content": [answer]}},
        assistant("2", {"type": "text", "text": "bye"}),
        {"type": "system", "subtype": "api_retry", "attempt": 1, "error_status": 529},
    )
    assert (stream.turns, stream.progress, stream.model, stream.version) == (
        *(2, "turn 2, Edit", "m"),
        "2.1",
    )
    assert [entry.type for entry in entries] == [
        *("system", "thinking", "text", "tool_use", "tool_result", "text", "system"),
    ]
    assert entries[4].text == "ok"
    assert entries[3].input == {"a": 1}


def test_partial_messages_give_the_tokens_of_each_answer(tmp_path: Path) -> None:
    start = {"model": "m", "usage": {"input_tokens": 5, "output_tokens": 1}}
    events = [
        {"type": "message_delta", "usage": {"output_tokens": 99}},
        {"type": "message_start", "message": start},
        {"type": "message_delta", "usage": {"output_tokens": 7}},
    ]
    stream, _ = read(tmp_path, *({"type": "stream_event", "event": event} for event in events))
    assert stream.finished_messages == [("m", Tokens(input=5, output=7))]


HOSTILE: list[Any] = [
    "",
    "{",
    "[]",
    "null",
    "NaN",
    '{"type": 7}',
    '{"type": "assistant"}',
    '{"type": "assistant", "message": []}',
    '{"type": "assistant", "message": {"id": {}, "content": "x"}}',
    '{"type": "assistant", "message": {"content": [7, null, {"type": "text", "text": {}}]}}',
    '{"type": "assistant", "message": {"content": [{"type": "tool_use", "name": 1, "input": []}]}}',
    '{"type": "user", "message": {"content": [{"type": "tool_result", "content": {"a": 1}}]}}',
    '{"type": "system", "subtype": "init", "model": ["x"]}',
    '{"type": "stream_event", "event": {"type": "message_start", "message": 3}}',
    '{"type": "result"}',
    '{"type": "result", "is_error": "no", "num_turns": -1, "total_cost_usd": "NaN", "errors": 3}',
    '{"type": "result", "total_cost_usd": NaN, "modelUsage": {"a": 1}, "usage": []}',
    '{"type": "result", "total_cost_usd": -1, "num_turns": 1e300, "usage": {"input_tokens": true}}',
    '{"type": "result", "num_turns": ' + "9" * 5000 + "}",
    "[" * 200_000,
    '{"type": "x", "a": ' * 100_000,
    json.dumps({"type": "result", "result": "x" * 1_000_000, "subtype": "y" * 100_000}),
    r'{"type": "assistant", "message": {"content": [{"type": "text", "text": "\ud800 \udc00"}]}}',
    r'{"type": "result", "result": "\uDFFF", "errors": [{"\ud800": 1}]}',
    '{"a\\ud800": ' * 900 + "1" + "}" * 900,
]


@pytest.mark.parametrize("line", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_lines_are_survived_and_bounded(tmp_path: Path, line: str) -> None:
    stream, entries = read(tmp_path, line, RESULT, line)
    assert all(len(entry.text) < 200_000 for entry in entries)
    if stream.result is not None and stream.result.report.usage != Usage():
        assert stream.result.report.usage.cost_usd == 0.5
    assert stream.result is not None


def test_result_without_is_error_is_an_error(tmp_path: Path) -> None:
    stream, _ = read(tmp_path, {"type": "result", "subtype": "success"})
    assert stream.result is not None
    assert stream.result.is_error
    assert stream.result.report.usage == Usage()


def test_last_result_counts(tmp_path: Path) -> None:
    stream, _ = read(tmp_path, {**RESULT, "total_cost_usd": 0.0}, RESULT)
    assert stream.result is not None
    assert stream.result.report.usage.cost_usd == 0.5


def test_huge_tool_input_is_cut_in_the_transcript(tmp_path: Path) -> None:
    tool = {"type": "tool_use", "id": "t", "name": "Write", "input": {"content": "x" * 1_000_000}}
    _, entries = read(tmp_path, assistant("1", tool))
    assert entries[0].input is not None
    assert list(entries[0].input) == ["truncated"]
    assert len(entries[0].input["truncated"]) < 200_000
