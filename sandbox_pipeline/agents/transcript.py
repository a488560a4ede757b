"""Transcripts: append-only JSONL of what an agent said and did, one schema for all agents."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from pydantic_core import to_json

from sandbox_pipeline.records import Value
from sandbox_pipeline.redaction import Redactor

MAX_TEXT = 100_000
MAX_TRANSCRIPT_BYTES = 20_000_000

EntryType = Literal[
    "system", "prompt", "text", "thinking", "tool_use", "tool_result", "output", "result"
]


class Entry(Value):
    """One line of a transcript.

    Attributes:
        time: seconds since 1970 at which it was read.
        type: what it is; `output` is a line of a plain command.
        name: of the tool, or `stdout` / `stderr`.
        input: of a tool.
        data: what else the agent reported, such as usage.
    """

    time: float
    type: EntryType
    text: str = ""
    name: str | None = None
    tool_use_id: str | None = None
    input: dict[str, Any] | None = None
    is_error: bool | None = None
    data: dict[str, Any] | None = None


class TranscriptWriter:
    """Writes a transcript anew; redacts, and bounds each entry and the whole."""

    def __init__(self, path: Path, redactor: Redactor) -> None:
        self._file = path.open("wb")
        self._redactor = redactor
        self._length = 0
        self._waiting: list[bytes] = []
        self._many = False
        self.truncated = False
        self.leaked = False

    def add(self, entry_type: EntryType, text: str = "", **fields: Any) -> None:
        """Append one entry; silently no more once the transcript is full (`truncated`).

        Args:
            entry_type: see `Entry`.
            text: likewise.
            **fields: the other ones of `Entry`.
        """
        if self.truncated:
            return
        if len(text) > MAX_TEXT:
            text = f"{text[:MAX_TEXT]}… ({len(text)} characters)"
        # JSON allows halves of surrogate pairs in strings, UTF-8 does not.
        text = text.encode("utf-8", "replace").decode("utf-8")
        line = _line(entry_type, text, fields)
        if self._length + len(line) > MAX_TRANSCRIPT_BYTES:
            self.truncated = True
            line = _line("system", "transcript is full; the rest is in the logs", {})
        self._length += len(line)
        self._waiting.append(line)
        if not self._many:
            self._write()

    @contextmanager
    def many(self) -> Generator[None]:
        """Entries that come at once are also redacted and written at once, at its end."""
        self._many = True
        try:
            yield
        finally:
            self._many = False
            self._write()

    def _write(self) -> None:
        # No form of a secret can be in two lines of JSON: what is between them is no line break.
        lines = b"".join(self._waiting)
        self._waiting.clear()
        cleaned, leaked = self._redactor.clean(lines)
        self._length += len(cleaned) - len(lines)
        self.leaked = self.leaked or leaked
        self._file.write(cleaned)
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def _line(entry_type: EntryType, text: str, fields: Mapping[str, Any]) -> bytes:
    """An `Entry` as JSON, which is not made first: that takes longer than all else of a line."""
    entry = {"time": time.time(), "type": entry_type, "text": text}
    entry |= {name: value for name, value in fields.items() if value is not None}
    return to_json(entry, inf_nan_mode="null") + b"\n"


def read_transcript(path: Path) -> list[Entry]:
    """The entries of a transcript; a last line cut short by a crash is left out."""
    entries: list[Entry] = []
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                entries.append(Entry.model_validate_json(line))
    return entries
