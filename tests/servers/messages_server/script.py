"""What the server answers: scripted conversations and faults."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

OPENING_CHARACTERS = 20_000


@dataclass(frozen=True)
class Charge:
    """Tokens of one answer, as the API's `usage` has them."""

    input_tokens: int = 100
    output_tokens: int = 20
    cache_creation_input_tokens: int = 0
    cache_read_input_tokens: int = 0

    def __add__(self, other: Charge) -> Charge:
        return Charge(
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cache_creation_input_tokens + other.cache_creation_input_tokens,
            self.cache_read_input_tokens + other.cache_read_input_tokens,
        )


@dataclass(frozen=True)
class ToolCall:
    """A tool that the model wants to be run."""

    name: str
    input: Mapping[str, Any]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer.

    Attributes:
        status: answer with this status and an API-shaped error.
        body: instead of the API-shaped one, such as HTML.
        headers: added to the answer, such as `retry-after`.
        error_after_events: after so many events of a 200 stream, an `error` event.
        cut_after_events: after so many events of a 200 stream, the connection is dropped.
        delay_seconds: pause before the answer.
        event_delay_seconds: pause before each event of a stream.
    """

    status: int | None = None
    message: str = "scripted fault"
    body: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict[str, str])
    error_after_events: int | None = None
    cut_after_events: int | None = None
    delay_seconds: float = 0.0
    event_delay_seconds: float = 0.0

    @property
    def breaks_stream(self) -> bool:
        """Whether the answer begins but doesn't come to its end."""
        return self.error_after_events is not None or self.cut_after_events is not None


@dataclass(frozen=True)
class Reply:
    """One answer of the model.

    Attributes:
        stop: the stop reason; None: what follows from the tools.
    """

    text: str = ""
    tools: Sequence[ToolCall] = ()
    charge: Charge = field(default_factory=Charge)
    fault: Fault | None = None
    stop: str | None = None

    @property
    def stop_reason(self) -> str:
        """As the API names it."""
        return self.stop or ("tool_use" if self.tools else "end_turn")


@dataclass(frozen=True)
class Ask:
    """What a script sees of a request.

    Attributes:
        number: 0-based count of the requests to `/v1/messages`, of all conversations.
        turn: how many answers of the model the conversation has already.
        opening: the text of the first user message, which holds the prompt.
    """

    number: int
    turn: int
    opening: str
    body: Mapping[str, Any]

    @property
    def tool_results(self) -> list[str]:
        """Every tool result so far, as text."""
        found: list[str] = []
        for message in _messages(self.body):
            for block in _blocks(message):
                if block.get("type") == "tool_result":
                    content = block.get("content")
                    found.append(content if isinstance(content, str) else json.dumps(content))
        return found


Script = Callable[[Ask], Reply]


def steps(*replies: Reply) -> Script:
    """The n-th reply at the n-th turn of each conversation; the last one from then on."""

    def script(ask: Ask) -> Reply:
        return replies[min(ask.turn, len(replies) - 1)]

    return script


def say(text: str, *tools: ToolCall, charge: Charge | None = None) -> Reply:
    """An answer with this text and these tool calls."""
    return Reply(text, tools, charge or Charge())


def read_ask(number: int, body: Mapping[str, Any]) -> Ask:
    """What a script needs of a request."""
    messages = _messages(body)
    turn = sum(1 for message in messages if message.get("role") == "assistant")
    opening = ""
    if messages:
        opening = "\n".join(str(block.get("text", "")) for block in _blocks(messages[0]))
    return Ask(number, turn, opening[-OPENING_CHARACTERS:], body)


def _messages(body: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return cast("list[Mapping[str, Any]]", body.get("messages") or [])


def _blocks(message: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return cast("list[Mapping[str, Any]]", content or [])
