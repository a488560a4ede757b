"""One local sandbox as the orchestrator has it: requests to the shim inside."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import re
import socket
import struct
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.sandboxes.base import HOME, Command, CommandResult, Resources
from sandbox_pipeline.sandboxes.limits import cgroup_usage
from sandbox_pipeline.sandboxes.local_folder import Meta, SandboxFolder
from sandbox_pipeline.sandboxes.shim import LENGTHS
from sandbox_pipeline.sandboxes.trees import TooDeepError, tree_bytes

ANSWER_SECONDS = 30.0
LAST_WORDS_SECONDS = 2.0
PING_STEP_SECONDS = 0.05
SLOWEST_BYTES_PER_SECOND = 5e6
LONGEST_HEADER_BYTES = 65_536
NO_FILE = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "EACCES", "ENAMETOOLONG", "ENXIO")
NO_ROOM = frozenset({"ENOSPC", "EDQUOT", "EFBIG"})

T = TypeVar("T")


class LocalSandbox:
    """One live sandbox on this machine. What it answers is not to be trusted, only bounded."""

    def __init__(self, folder: SandboxFolder, meta: Meta) -> None:
        self.folder = folder
        self._meta = meta
        self._translate = _translator(folder.home) if meta.isolation == "none" else _same

    @property
    def sandbox_id(self) -> str:
        """The folder's name."""
        return self.folder.sandbox_id

    async def run(self, command: Command) -> CommandResult:
        """See `Sandbox.run`; a command whose caller is cancelled is killed."""
        header = {
            "op": "run",
            "argv": [self._translate(word) for word in command.argv],
            "cwd": self._translate(command.cwd),
            "env": {name: self._translate(value) for name, value in command.env.items()},
            "timeout": command.timeout_seconds,
            "max_output": command.max_output_bytes,
        }
        answer, body = await self._call(
            header,
            command.stdin,
            most_bytes=2 * command.max_output_bytes,
            seconds=command.timeout_seconds + ANSWER_SECONDS,
        )
        return await self._understood(lambda: _command_result(answer, body))

    async def read(self, path: str, *, offset: int = 0, max_bytes: int = 1_000_000) -> bytes:
        """See `Sandbox.read`; what is no readable file counts as missing."""
        header = {"op": "read", "path": self._translate(path), "offset": offset, "max": max_bytes}
        answer, body = await self._call(header, most_bytes=max_bytes)
        if answer.get("error") in NO_FILE:
            raise FileNotFoundError(errno.ENOENT, printable(answer.get("message")), path)
        self._check(answer)
        return body

    async def write(self, path: str, data: bytes) -> None:
        """See `Sandbox.write`; a file's mode is kept. `UNAVAILABLE` where the sandbox refuses."""
        seconds = ANSWER_SECONDS + len(data) / SLOWEST_BYTES_PER_SECOND
        answer, _ = await self._call(
            {"op": "write", "path": self._translate(path)}, data, seconds=seconds
        )
        self._check(answer)

    async def extend(self, ttl_seconds: float) -> None:
        """See `Sandbox.extend`."""
        if not self.folder.extend(ttl_seconds):
            raise self._gone()

    async def resources(self) -> Resources:
        """See `Sandbox.resources`; the size of the disk is found by walking the home."""
        used = cgroup_usage(tuple(map(Path, self._meta.cgroups)))
        if used.cpu_seconds is None:
            answer, _ = await self._call({"op": "resources"})
            cpu_seconds = answer.get("cpu_seconds")
            if isinstance(cpu_seconds, int | float) and 0 <= cpu_seconds < float("inf"):
                used = replace(used, cpu_seconds=float(cpu_seconds))
        if not self.folder.is_alive():
            raise self._gone()
        with contextlib.suppress(OSError, TooDeepError):
            size = await asyncio.to_thread(tree_bytes, str(self.folder.home))
            used = replace(used, disk_bytes=size)
        return used

    async def ping(self, seconds: float) -> None:
        """Return once the shim answers.

        Raises:
            ProviderError: `GONE` as soon as the sandbox is seen to be no more; an end at its very
                start may leave a process behind that holds the connection open.
        """
        call = asyncio.create_task(self._call({"op": "ping"}, seconds=seconds))
        try:
            while not (await asyncio.wait([call], timeout=PING_STEP_SECONDS))[0]:
                if not self.folder.is_alive():
                    raise self._gone()
            await call
        finally:
            call.cancel()

    def _check(self, answer: Mapping[str, object]) -> None:
        if "error" in answer:
            message = f"{self.sandbox_id}: {printable(answer.get('message'))}"
            full = answer.get("error") in NO_ROOM
            raise ProviderError(ErrorKind.EXHAUSTED if full else ErrorKind.UNAVAILABLE, message)

    async def _understood(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except (ValueError, TypeError, KeyError) as error:
            message = f"the sandbox answered nonsense: {printable(error)}"
            raise await self._failure(message) from error

    async def _call(
        self,
        header: Mapping[str, object],
        body: bytes = b"",
        *,
        most_bytes: int = 0,
        seconds: float = ANSWER_SECONDS,
    ) -> tuple[dict[str, object], bytes]:
        """Send one request and receive its answer."""
        if not self.folder.is_alive():
            raise self._gone()
        try:
            async with asyncio.timeout(seconds):
                return await _exchange(self.folder, header, body, most_bytes)
        except TimeoutError as error:
            reason = f"did not answer within {seconds:.0f} s"
            raise await self._failure(reason) from error
        except (OSError, EOFError, ValueError, RecursionError, struct.error) as error:
            reason = f"did not answer properly: {printable(error) or type(error).__name__}"
            raise await self._failure(reason) from error

    async def _failure(self, reason: str) -> ProviderError:
        """`GONE` when the sandbox is, or is about to be, no more; else `AMBIGUOUS`."""
        end = time.monotonic() + LAST_WORDS_SECONDS
        while self.folder.is_alive():
            if time.monotonic() > end:
                return ProviderError(ErrorKind.AMBIGUOUS, f"{self.sandbox_id} {reason}")
            await asyncio.sleep(0.02)
        return self._gone()

    def _gone(self) -> ProviderError:
        return gone(self.folder)


def gone(folder: SandboxFolder) -> ProviderError:
    """The error for a sandbox that is no more."""
    return ProviderError(
        ErrorKind.GONE, f"sandbox {folder.sandbox_id} is gone: {folder.ended_reason()}"
    )


async def _exchange(
    folder: SandboxFolder, header: Mapping[str, object], body: bytes, most_bytes: int
) -> tuple[dict[str, object], bytes]:
    loop = asyncio.get_running_loop()
    while True:
        try:
            connection = folder.connect()
            break
        except BlockingIOError:
            await asyncio.sleep(0.01)
    with connection:
        data = json.dumps(header).encode("ascii")
        await loop.sock_sendall(connection, LENGTHS.pack(len(data), len(body)) + data)
        if body:
            await loop.sock_sendall(connection, body)
        lengths = await _receive(connection, LENGTHS.size)
        header_length, body_length = LENGTHS.unpack(lengths)
        if header_length > LONGEST_HEADER_BYTES or body_length > most_bytes:
            message = f"an answer of {header_length} + {body_length} bytes"
            raise ValueError(message)
        answer: Any = json.loads(await _receive(connection, header_length))
        if not isinstance(answer, dict):
            message = "not a mapping"
            raise ValueError(message)  # noqa: TRY004 (all nonsense alike)
        return cast("dict[str, object]", answer), await _receive(connection, body_length)


async def _receive(connection: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    data = bytearray()
    while len(data) < length:
        part = await loop.sock_recv(connection, min(1 << 18, length - len(data)))
        if not part:
            message = "the connection was closed"
            raise EOFError(message)
        data += part
    return bytes(data)


def _command_result(answer: Mapping[str, object], body: bytes) -> CommandResult:
    exit_code, stdout = answer["exit_code"], answer["stdout"]
    if not isinstance(exit_code, int) or not 0 <= exit_code <= 255:
        message = "exit_code"
        raise ValueError(message)
    if not isinstance(stdout, int) or not 0 <= stdout <= len(body):
        message = "stdout"
        raise ValueError(message)
    return CommandResult(
        exit_code=exit_code,
        stdout=body[:stdout],
        stderr=body[stdout:],
        timed_out=answer["timed_out"] is True,
        truncated=answer["truncated"] is True,
    )


def _same(text: str) -> str:
    return text


def _translator(home: Path) -> Callable[[str], str]:
    """Replaces `/home/user` by where that is without isolation; leaves that place itself alone."""
    real = str(home)
    pattern = re.compile(rf"{re.escape(real)}|(?<![\w./-]){re.escape(HOME)}(?![\w.-])")
    return lambda text: pattern.sub(lambda _match: real, text)


def printable(value: object) -> str:
    """Anything a sandbox said, fit for a message."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value)[:300])
