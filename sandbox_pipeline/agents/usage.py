"""What agents report of tokens and cost, read from their output.

The output is another program's word and may be anything: a field that is missing, negative or
of the wrong type is unknown, which is `None`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from sandbox_pipeline.agents.models import Tokens
from sandbox_pipeline.records import Usage

MAX_TOKENS = 10**12
MAX_COST_USD = 10.0**7
MAX_DOCUMENT_STARTS = 50


@dataclass(frozen=True)
class Report:
    """What an agent told of its work; each field None where it didn't."""

    usage: Usage = field(default_factory=Usage)
    turns: int | None = None
    model: str | None = None


class MessageUsage:
    """Adds up one answer of the Messages API from the events of its stream.

    `message_delta` counts are cumulative: they replace those of `message_start`.
    """

    def __init__(self) -> None:
        self.model: str | None = None
        self.complete = False
        self._counts: dict[str, int] = {}

    @property
    def tokens(self) -> Tokens | None:
        """What was charged so far; None before the first count."""
        if not self._counts:
            return None
        return Tokens(
            input=self._counts.get("input_tokens", 0),
            output=self._counts.get("output_tokens", 0),
            cache_creation=self._counts.get("cache_creation_input_tokens", 0),
            cache_read=self._counts.get("cache_read_input_tokens", 0),
            cache_creation_1h=self._counts.get("ephemeral_1h_input_tokens", 0),
        )

    def event(self, event: Mapping[str, Any]) -> None:
        """Take one event of the stream."""
        kind = event.get("type")
        if kind == "message_start":
            self._message(as_mapping(event.get("message")))
        elif kind == "message_delta":
            self._take(as_mapping(event.get("usage")))
        elif kind == "message_stop":
            self.complete = True

    def whole(self, message: Mapping[str, Any]) -> None:
        """Take an answer that came in one piece."""
        self._message(message)
        self.complete = True

    def _message(self, message: Mapping[str, Any]) -> None:
        self.model = as_text(message.get("model"))
        self._take(as_mapping(message.get("usage")))

    def _take(self, usage: Mapping[str, Any]) -> None:
        for name in (
            "input_tokens",
            "output_tokens",
            "cache_creation_input_tokens",
            "cache_read_input_tokens",
        ):
            count = as_count(usage.get(name))
            if count is not None:
                self._counts[name] = count
        name = "ephemeral_1h_input_tokens"
        hour = as_count(as_mapping(usage.get("cache_creation")).get(name))
        if hour is not None:
            self._counts[name] = hour


def parse_usage(usage_format: str, output: str) -> Report:
    """What the output says, in one of the formats of `PARSERS`.

    Raises:
        KeyError: there is no such format.
    """
    return PARSERS[usage_format](output)


def claude_result(event: Mapping[str, Any]) -> Report:
    """What a `result` event of Claude Code's stream-json says.

    `modelUsage` covers all that was billed, also by subagents; `usage` only the main loop.
    """
    by_model = [as_mapping(entry) for entry in as_mapping(event.get("modelUsage")).values()]
    usage = as_mapping(event.get("usage"))

    def tokens(camel: str, snake: str) -> int | None:
        if by_model:
            return _sum(as_count(entry.get(camel)) for entry in by_model)
        return as_count(usage.get(snake))

    return Report(
        usage=Usage(
            input_tokens=tokens("inputTokens", "input_tokens"),
            output_tokens=tokens("outputTokens", "output_tokens"),
            cache_creation_input_tokens=tokens(
                "cacheCreationInputTokens", "cache_creation_input_tokens"
            ),
            cache_read_input_tokens=tokens("cacheReadInputTokens", "cache_read_input_tokens"),
            cost_usd=as_cost(event.get("total_cost_usd")),
        ),
        turns=as_count(event.get("num_turns")),
    )


def _none(output: str) -> Report:
    return Report()


def _claude(output: str) -> Report:
    report = Report()
    model = None
    for event in _lines(output):
        if event.get("type") == "system" and event.get("subtype") == "init":
            model = as_text(event.get("model"))
        elif event.get("type") == "result":
            report = claude_result(event)
    return Report(report.usage, report.turns, model)


def _codex(output: str) -> Report:
    turns = [event for event in _lines(output) if event.get("type") == "turn.completed"]
    if not turns:
        return Report()
    # Each turn's counts are the thread's totals so far; cached input is part of the input.
    usage = as_mapping(turns[-1].get("usage"))
    cached = as_count(usage.get("cached_input_tokens"))
    return Report(
        usage=Usage(
            input_tokens=_without(as_count(usage.get("input_tokens")), cached),
            output_tokens=as_count(usage.get("output_tokens")),
            cache_read_input_tokens=cached,
        ),
        turns=len(turns),
    )


def _gemini(output: str) -> Report:
    models = as_mapping(as_mapping(_document(output).get("stats")).get("models"))
    entries = [as_mapping(entry) for entry in models.values()]
    tokens = [as_mapping(entry.get("tokens")) for entry in entries]

    def total(name: str) -> int | None:
        return _sum(as_count(entry.get(name)) for entry in tokens)

    cached = total("cached")
    requests = [as_count(as_mapping(entry.get("api")).get("totalRequests")) for entry in entries]
    return Report(
        usage=Usage(
            input_tokens=_without(total("prompt"), cached),
            output_tokens=_sum((total("candidates"), total("thoughts"))),
            cache_read_input_tokens=cached,
        ),
        turns=_sum(requests),
        model=next(iter(models), None),
    )


def _opencode(output: str) -> Report:
    steps = [
        as_mapping(event.get("part"))
        for event in _lines(output)
        if event.get("type") == "step_finish"
    ]
    if not steps:
        return Report()
    tokens = [as_mapping(step.get("tokens")) for step in steps]
    caches = [as_mapping(entry.get("cache")) for entry in tokens]
    costs = [cost for step in steps if (cost := as_cost(step.get("cost"))) is not None]

    def total(name: str) -> int | None:
        return _sum(as_count(entry.get(name)) for entry in tokens)

    return Report(
        usage=Usage(
            input_tokens=total("input"),
            output_tokens=_sum((total("output"), total("reasoning"))),
            cache_creation_input_tokens=_sum(as_count(cache.get("write")) for cache in caches),
            cache_read_input_tokens=_sum(as_count(cache.get("read")) for cache in caches),
            cost_usd=math.fsum(costs) if costs else None,
        ),
        turns=len(steps),
    )


def _mini(output: str) -> Report:
    info = as_mapping(_document(output).get("info"))
    stats = as_mapping(info.get("model_stats"))
    return Report(
        usage=Usage(cost_usd=as_cost(stats.get("instance_cost"))),
        turns=as_count(stats.get("api_calls")),
    )


PARSERS: Mapping[str, Callable[[str], Report]] = {
    "none": _none,
    "claude-stream-json": _claude,
    "codex-jsonl": _codex,
    "gemini-json": _gemini,
    "opencode-jsonl": _opencode,
    "mini-json": _mini,
}


def as_mapping(value: object) -> Mapping[str, Any]:
    """The value where it is a JSON object, else an empty one."""
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """The value where it is a JSON array, else an empty one."""
    return cast("list[Any]", value) if isinstance(value, list) else []


def as_text(value: object, max_characters: int = 1000) -> str | None:
    """The value where it is a string, bounded."""
    return value[:max_characters] if isinstance(value, str) else None


def as_count(value: object) -> int | None:
    """The value where it is a plausible count."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_TOKENS:
        return None
    return value


def as_cost(value: object) -> float | None:
    """The value where it is a plausible amount of dollars."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if 0 <= value <= MAX_COST_USD else None


def parse_object(text: str) -> Mapping[str, Any] | None:
    """The JSON object that the text is; None where it is anything else."""
    try:
        value = json.loads(text)
        if "\\ud" in text or "\\uD" in text:
            value = _encodable(value)
    except (ValueError, RecursionError):
        return None
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else None


def _encodable(value: Any) -> Any:
    """The value without halves of surrogate pairs, which JSON can express and UTF-8 can't."""
    match value:
        case str():
            return value.encode("utf-8", "replace").decode()
        case list():
            return [_encodable(item) for item in as_list(cast("object", value))]
        case dict():
            items = as_mapping(cast("object", value)).items()
            return {_encodable(name): _encodable(item) for name, item in items}
        case _:
            return value


def _lines(output: str) -> Iterator[Mapping[str, Any]]:
    for line in output.splitlines():
        stripped = line.strip()
        if stripped.startswith("{"):
            event = parse_object(stripped)
            if event is not None:
                yield event


def _document(output: str) -> Mapping[str, Any]:
    """The last JSON object that begins a line, since programs log before they answer."""
    decoder = json.JSONDecoder()
    found: Mapping[str, Any] = {}
    position = 0
    for _ in range(MAX_DOCUMENT_STARTS):
        position = _next_start(output, position)
        if position < 0:
            break
        try:
            value, end = decoder.raw_decode(output, position)
        except (ValueError, RecursionError):
            position += 1
            continue
        found = as_mapping(value)
        position = end
    return found


def _next_start(output: str, position: int) -> int:
    if position == 0 and output.startswith("{"):
        return 0
    at = output.find("\n{", max(0, position - 1))
    return at + 1 if at >= 0 else -1


def _sum(counts: Iterable[int | None]) -> int | None:
    known = [count for count in counts if count is not None]
    return sum(known) if known else None


def _without(count: int | None, part: int | None) -> int | None:
    if count is None or part is None:
        return count
    return max(0, count - part)
