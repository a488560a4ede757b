"""Reads Claude Code's `--output-format stream-json` while it comes.

What is read was written inside the sandbox, where the agent's own commands can write to the same
pipe: nothing is trusted to be there, to be of its type, or to be small.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sandbox_pipeline.agents.models import Tokens
from sandbox_pipeline.agents.transcript import MAX_TEXT, TranscriptWriter
from sandbox_pipeline.agents.usage import (
    MessageUsage,
    Report,
    as_count,
    as_list,
    as_mapping,
    as_text,
    claude_result,
    parse_object,
)

MAX_STREAM_LINE_BYTES = 8_000_000
MAX_SEEN_MESSAGES = 20_000


@dataclass(frozen=True)
class StreamResult:
    """The `result` event, the last thing that Claude Code says.

    Attributes:
        subtype: `success` also where the API failed; see `is_error`.
        text: the agent's last words, or what failed.
        api_error_status: HTTP status of the model API's refusal.
    """

    subtype: str
    is_error: bool
    text: str
    api_error_status: int | None
    report: Report
    session_id: str | None


class ClaudeStream:
    """Follows one run, and writes what it sees to the transcript.

    Attributes:
        result: None until it came; the last one where there are several, as each has the
            totals so far.
        model, version: from the `init` event.
        turns: answers of the model so far.
        last_tool: name of the tool used last.
        unreadable: lines that are not stream-json.
        finished_messages: model and tokens of each answer, where the stream has its parts
            (`--include-partial-messages`).
    """

    def __init__(self, transcript: TranscriptWriter) -> None:
        self.result: StreamResult | None = None
        self.model: str | None = None
        self.version: str | None = None
        self.turns = 0
        self.last_tool: str | None = None
        self.unreadable = 0
        self.finished_messages: list[tuple[str | None, Tokens]] = []
        self._transcript = transcript
        self._seen: set[str] = set()
        self._partial: MessageUsage | None = None

    def line(self, text: str) -> None:
        """Take one line of standard output."""
        if not text.strip():
            return
        event = parse_object(text)
        if event is None or not isinstance(event.get("type"), str):
            self.unreadable += 1
            self._transcript.add("output", text, name="stdout")
            return
        kind = event["type"]
        if kind == "system":
            self._system(event)
        elif kind == "assistant":
            self._assistant(as_mapping(event.get("message")))
        elif kind == "user":
            self._user(as_mapping(event.get("message")))
        elif kind == "stream_event":
            self._stream_event(as_mapping(event.get("event")))
        elif kind == "result":
            self._result(event)

    @property
    def progress(self) -> str:
        """One line for the live display."""
        parts = [f"turn {self.turns}"]
        if self.last_tool is not None:
            parts.append(self.last_tool)
        return ", ".join(parts)

    def _system(self, event: Mapping[str, Any]) -> None:
        subtype = as_text(event.get("subtype"), 100)
        if subtype == "init" and self.model is None:
            self.model = as_text(event.get("model"), 200)
            self.version = as_text(event.get("claude_code_version"), 100)
            data = {
                name: as_text(event.get(name))
                for name in ("model", "claude_code_version", "session_id", "permissionMode")
            }
            self._transcript.add("system", "init", data=data)
        elif subtype == "api_retry":
            self._transcript.add(
                "system",
                "api_retry",
                data={
                    "attempt": as_count(event.get("attempt")),
                    "error_status": as_count(event.get("error_status")),
                    "error": as_text(event.get("error")),
                },
            )

    def _assistant(self, message: Mapping[str, Any]) -> None:
        # One event comes for each block of an answer; they share the answer's id.
        message_id = as_text(message.get("id"), 200)
        if message_id is None or message_id not in self._seen:
            self.turns += 1
            if message_id is not None and len(self._seen) < MAX_SEEN_MESSAGES:
                self._seen.add(message_id)
        for block in map(as_mapping, as_list(message.get("content"))):
            kind = block.get("type")
            if kind == "text":
                self._transcript.add("text", _text(block.get("text")))
            elif kind == "thinking":
                self._transcript.add("thinking", _text(block.get("thinking")))
            elif kind == "tool_use":
                self.last_tool = as_text(block.get("name"), 100)
                self._transcript.add(
                    "tool_use",
                    name=self.last_tool,
                    tool_use_id=as_text(block.get("id"), 200),
                    input=bounded_input(as_mapping(block.get("input"))),
                )

    def _user(self, message: Mapping[str, Any]) -> None:
        for block in map(as_mapping, as_list(message.get("content"))):
            if block.get("type") == "tool_result":
                self._transcript.add(
                    "tool_result",
                    _text(block.get("content")),
                    tool_use_id=as_text(block.get("tool_use_id"), 200),
                    is_error=block.get("is_error") is True,
                )

    def _stream_event(self, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        if kind == "message_start":
            self._partial = MessageUsage()
        if self._partial is None:
            return
        self._partial.event(event)
        if kind == "message_delta" and self._partial.tokens is not None:
            self.finished_messages.append((self._partial.model, self._partial.tokens))
            self._partial = None

    def _result(self, event: Mapping[str, Any]) -> None:
        errors = [as_text(error) or "" for error in as_list(event.get("errors"))[:5]]
        text = as_text(event.get("result"), MAX_TEXT) or "; ".join(filter(None, errors))
        self.result = StreamResult(
            subtype=as_text(event.get("subtype"), 100) or "",
            is_error=event.get("is_error") is not False,
            text=text,
            api_error_status=as_count(event.get("api_error_status")),
            report=claude_result(event),
            session_id=as_text(event.get("session_id"), 100),
        )
        self._transcript.add(
            "result",
            text,
            is_error=self.result.is_error,
            data={
                "subtype": self.result.subtype,
                "api_error_status": self.result.api_error_status,
                "turns": self.result.report.turns,
                "session_id": self.result.session_id,
                "usage": self.result.report.usage.model_dump(),
            },
        )


def bounded_input(value: Mapping[str, Any]) -> dict[str, Any]:
    """A tool's input as it may go into a transcript."""
    text = json.dumps(value)
    if len(text) <= MAX_TEXT:
        return dict(value)
    return {"truncated": f"{text[:MAX_TEXT]}… ({len(text)} characters)"}


def _text(content: object) -> str:
    if isinstance(content, str):
        return content
    blocks = map(as_mapping, as_list(content))
    return "\n".join(
        text
        if isinstance(text := block.get("text"), str)
        else f"[{as_text(block.get('type'), 50)}]"
        for block in blocks
    )
