"""A transcript as people read it, the same for all agents."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console

from sandbox_pipeline.agents.transcript import Entry

MAX_LINES = 40
INDENT = "    "
_STYLES = {"prompt": "bold", "thinking": "italic dim", "tool_use": "cyan", "result": "green"}
_NAMES = {"prompt": "prompt", "text": "agent", "system": "note", "result": "result"}


def print_transcript(entries: Sequence[Entry], console: Console) -> None:
    """Each entry with the time since the first; long answers of tools are cut."""
    began = entries[0].time if entries else 0.0
    previous = ""
    for entry in entries:
        heading = _heading(entry)
        if heading != previous or entry.type != "output":
            console.print(f"[{entry.time - began:8.1f} s] {heading}", style=_style(entry), **_PLAIN)
        previous = heading
        for line in _lines(entry):
            console.print(f"{INDENT}{line}", style=_style(entry), **_PLAIN)


_PLAIN: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}


def _heading(entry: Entry) -> str:
    if entry.type == "tool_use":
        return f"uses {entry.name}"
    if entry.type == "tool_result":
        return "is told of an error" if entry.is_error else "is told"
    if entry.type == "output":
        return entry.name or "output"
    return _NAMES.get(entry.type, entry.type)


def _style(entry: Entry) -> str:
    return "red" if entry.is_error else _STYLES.get(entry.type, "")


def _lines(entry: Entry) -> Iterator[str]:
    text = _visible(entry.text)
    if entry.type == "tool_use" and entry.input:
        text = "\n".join(_fields(entry.input))
    lines = text.splitlines()
    yield from lines[:MAX_LINES] if entry.type == "tool_result" else lines
    if entry.type == "tool_result" and len(lines) > MAX_LINES:
        yield f"… {len(lines) - MAX_LINES} more lines; all with --json"
    if entry.data and entry.type == "result":
        yield _visible(json.dumps(entry.data, ensure_ascii=False))


def _fields(tool_input: Mapping[str, Any]) -> Iterator[str]:
    """A command as in a shell; other fields by name, long ones below it."""
    for name, value in tool_input.items():
        text = _visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        first, *rest = text.splitlines() or [""]
        if name == "command" and len(tool_input) <= 2:
            yield f"$ {first}"
        elif rest:
            yield f"{name}:"
            yield f"{INDENT}{first}"
        else:
            yield f"{name}: {first}"
        yield from (f"{INDENT}{line}" for line in rest)


def _visible(text: str) -> str:
    """Without what could steer the terminal."""
    return "".join(char if char.isprintable() or char in "\n\t" else "�" for char in text)
