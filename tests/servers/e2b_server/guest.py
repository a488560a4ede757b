"""Runs inside each sandbox: starts its processes and opens its files for the server.

Standard library only, since it sees none of the project. Messages in both directions are a
4-byte length, then JSON; file descriptors travel with the length.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Message = dict[str, Any]


class Guest:
    """The agent at its end of the channel; each method named in a request is an operation."""

    def __init__(self, descriptor: int) -> None:
        self._channel = socket.socket(fileno=descriptor)
        self._channel.set_inheritable(False)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._given: list[int] = []
        self._opened: list[int] = []

    def serve(self) -> None:
        """Answer until the server is gone."""
        wake_read, wake_write = os.pipe()
        os.set_blocking(wake_write, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, _wake)
        while True:
            ready, _, _ = select.select([self._channel, wake_read], [], [])
            if wake_read in ready:
                os.read(wake_read, 4096)
            if self._channel in ready:
                self._answer(self._receive())
            self._reap()

    def _receive(self) -> Message:
        header, self._given, _, _ = socket.recv_fds(self._channel, 4, 3)
        if not header:
            sys.exit(0)
        header += self._exactly(4 - len(header))
        return json.loads(self._exactly(int.from_bytes(header, "big")))

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self._channel.recv(count - len(data))
            if not piece:
                sys.exit(0)
            data += piece
        return data

    def _send(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        data = json.dumps({**message, "fds": len(descriptors)}).encode()
        socket.send_fds(self._channel, [len(data).to_bytes(4, "big")], list(descriptors))
        self._channel.sendall(data)

    def _answer(self, request: Message) -> None:
        number, operation = request.pop("id"), request.pop("op")
        try:
            reply: Message = getattr(self, operation)(**request)
        except OSError as error:
            reply = {"errno": error.errno, "error": error.strerror or str(error)}
        except ValueError as error:
            reply = {"errno": 22, "error": str(error)}
        self._send({"id": number, **reply}, self._opened)
        for descriptor in (*self._given, *self._opened):
            os.close(descriptor)
        self._opened.clear()

    def _reap(self) -> None:
        for pid, child in list(self._children.items()):
            code = child.poll()
            if code is not None:
                del self._children[pid]
                self._send({"exited": pid, "code": code})

    def spawn(self, cmd: str, args: list[str], envs: dict[str, str], cwd: str) -> Message:
        """Start a process on the three descriptors that came along."""
        stdin, stdout, stderr = self._given
        child = subprocess.Popen(
            [cmd, *args],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            env={**os.environ, **envs},
            cwd=cwd or os.environ["HOME"],
        )
        self._children[child.pid] = child
        return {"pid": child.pid}

    def kill(self, pid: int, number: int) -> Message:
        """Send a signal."""
        os.kill(pid, number)
        return {}

    def open(self, path: str, *, write: bool) -> Message:
        """Open a file and hand it over."""
        target = Path(path).expanduser()
        if target.is_dir():
            raise IsADirectoryError(21, f"path is a directory: {path}")
        flags = os.O_RDONLY
        if write:
            target.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        self._opened.append(os.open(target, flags | os.O_CLOEXEC, 0o666))
        return _entry(target)

    def stat(self, path: str) -> Message:
        """What is there."""
        return _entry(Path(path))

    def mkdir(self, path: str) -> Message:
        """Make a folder and those above it."""
        Path(path).mkdir(parents=True)
        return _entry(Path(path))

    def move(self, source: str, destination: str) -> Message:
        """Rename, over what may be there."""
        Path(destination).parent.mkdir(parents=True, exist_ok=True)
        return _entry(Path(source).rename(destination))

    def remove(self, path: str) -> Message:
        """Remove a file or a whole folder."""
        target = Path(path)
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        else:
            target.unlink()
        return {}

    def list(self, path: str) -> Message:
        """What a folder has."""
        entries: list[Message] = []
        for child in sorted(Path(path).iterdir()):
            with contextlib.suppress(FileNotFoundError):
                entries.append(_entry(child))
        return {"entries": entries}


def _wake(_number: int, _frame: object) -> None:
    """Let the wake-up descriptor be written."""


def _entry(path: Path) -> Message:
    found = path.stat()
    return {
        "path": str(path),
        "name": path.name,
        "type": "dir" if path.is_dir() else "file",
        "size": found.st_size,
        "mode": found.st_mode & 0o7777,
    }


def _relay(port: int, path: str) -> None:
    """Carry connections to a port of the loopback on to a unix socket, in a process of its own."""
    if os.fork():
        return
    listener = socket.create_server(("127.0.0.1", port), backlog=64)
    while True:
        inside, _ = listener.accept()
        outside = socket.socket(socket.AF_UNIX)
        outside.connect(path)
        for source, sink in ((inside, outside), (outside, inside)):
            threading.Thread(target=_copy, args=(source, sink), daemon=True).start()


def _copy(source: socket.socket, sink: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65_536):
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_WR)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        _relay(int(sys.argv[2]), sys.argv[3])
    Guest(int(sys.argv[1])).serve()
