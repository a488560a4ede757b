"""An agent's raw output on its way to this machine: redacted, kept, and cut into lines."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Self

from sandbox_pipeline.redaction import RedactedStream, Redactor

MAX_LINE_BYTES = 65_536

OnLines = Callable[[str, list[str]], None]


class OutputLog:
    """Writes `stdout.log` and `stderr.log` anew and hands on the lines.

    Args:
        folder: where the logs go.
        redactor: cleans the bytes before anything else sees them.
        on_lines: hears `("stdout" | "stderr", lines)`, those that came at once; undecodable
            bytes are replaced and a line longer than `max_line_bytes` comes in pieces.
        max_line_bytes: agents whose lines are JSON documents need more than the default.
    """

    def __init__(
        self,
        folder: Path,
        redactor: Redactor,
        on_lines: OnLines,
        *,
        max_line_bytes: int = MAX_LINE_BYTES,
    ) -> None:
        self._streams: dict[str, RedactedStream] = {}
        self._partial: dict[str, bytearray] = {}
        self._files = {name: (folder / f"{name}.log").open("wb") for name in ("stdout", "stderr")}
        for name in self._files:
            self._streams[name] = redactor.stream()
            self._partial[name] = bytearray()
        self._on_lines = on_lines
        self._max_line_bytes = max_line_bytes
        self.received_bytes = 0

    @property
    def leaked(self) -> bool:
        """Whether a secret was found and removed."""
        return any(stream.leaked for stream in self._streams.values())

    async def feed(self, stream: str, chunk: bytes) -> None:
        """Take the next bytes of a stream."""
        self.received_bytes += len(chunk)
        self._keep(stream, self._streams[stream].feed(chunk))

    def finish(self) -> None:
        """Take what was held back, once no more comes."""
        for stream in self._files:
            self._keep(stream, self._streams[stream].finish())
            if self._partial[stream]:
                self._emit(stream, bytes(self._partial[stream]))
                self._partial[stream].clear()

    def _keep(self, stream: str, data: bytes) -> None:
        if not data:
            return
        self._files[stream].write(data)
        self._files[stream].flush()
        partial = self._partial[stream]
        lines, newline, rest = data.rpartition(b"\n")
        if newline:
            partial += lines
            self._emit(stream, bytes(partial))
            partial.clear()
        partial += rest
        while len(partial) > self._max_line_bytes:
            self._emit(stream, bytes(partial[: self._max_line_bytes]))
            del partial[: self._max_line_bytes]

    def _emit(self, stream: str, lines: bytes) -> None:
        whole = lines.decode("utf-8", "replace").split("\n")
        self._on_lines(stream, [line.rstrip("\r") for line in whole])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for file in self._files.values():
            file.close()
