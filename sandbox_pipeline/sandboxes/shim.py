"""Runs inside a local sandbox and does there what the host asks over one inherited socket.

Started as `python3 -I -S shim.py LISTEN_FD LIFELINE_FD NAME [direct]`; standard library only,
Python >= 3.9, few imports, since every sandbox pays for them. Nothing inside can reach the socket
by a path. Each connection carries one request and is served by a process of its own, so that none
blocks another; only what takes no time is answered at once. NAME is there to be found by.

A message is a 4-byte length of a JSON header, an 8-byte length of a body (both big-endian), the
header, the body. A request's header has `op`; an answer's has `error` where the request failed.

Ends once the other end of the lifeline is closed, which is when the supervisor died: with `direct`
(no isolation) by killing all its descendants, else bubblewrap's first process does that.
"""

# ruff: noqa: PTH103, PTH104, PTH108, PTH118, PTH120, PTH123, PTH208 (pathlib is slow to import)
from __future__ import annotations

import errno
import os
import select
import stat
import struct
import sys
import time

# The C modules beneath signal, socket and json: those alone make up most of a sandbox's start,
# by what they import for features that are not used here.
from _json import encode_basestring_ascii, make_scanner
from _socket import MSG_DONTWAIT, MSG_PEEK
from _socket import socket as Socket  # noqa: N812

TYPE_CHECKING = False  # as type checkers know it; the module typing takes 3 ms to import
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable, Iterator
    from types import ModuleType
    from typing import Any

    Message = dict[str, Any]
else:
    import _signal as signal

LENGTHS = struct.Struct(">IQ")
CHUNK = 1 << 16
TRANSFER_SECONDS = 300.0
IDLE_GRACE_SECONDS = 0.1
GRACE_SECONDS = 1.0
EXIT_TIMED_OUT = 124
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127
NO_PROCESS = "Resource temporarily unavailable"
SHIM_PID = os.getpid()
AT_ONCE_MS = 5
SMALL_REQUEST_BYTES = 8192
SMALL_ANSWER_BYTES = 1 << 16


class Ignored:
    """As contextlib.suppress, which takes longer to import than most requests take."""

    def __init__(self, *kinds: type[Exception]) -> None:
        self.kinds = kinds

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        return kind is not None and issubclass(kind, self.kinds)


class _Rules:
    """What JSON's scanner asks of a decoder."""

    strict = True
    object_hook = object_pairs_hook = None
    parse_float = parse_constant = float
    parse_int = int


_scan = make_scanner(_Rules)  # pyright: ignore[reportArgumentType] (a decoder, says typeshed)


def _parsed(data: bytes) -> Message:
    try:
        return _scan(data.decode("ascii"), 0)[0]
    except StopIteration as error:
        message = "not JSON"
        raise ValueError(message) from error


def _written(header: Message) -> bytes:
    """A flat mapping as JSON."""
    words = {True: "true", False: "false", None: "null"}
    parts: list[str] = []
    for name, value in header.items():
        if isinstance(value, str):
            text = encode_basestring_ascii(value)
        else:
            text = words[value] if value is None or isinstance(value, bool) else repr(value)
        parts.append(f"{encode_basestring_ascii(name)}: {text}")
    return f"{{{', '.join(parts)}}}".encode("ascii")


def main() -> None:
    """Serve until killed or until the supervisor is gone."""
    # Set by bubblewrap; it would be wrong for a command that runs elsewhere.
    os.environ.pop("PWD", None)
    listener = Socket(fileno=int(sys.argv[1]))
    lifeline = int(sys.argv[2])
    direct = _is_direct()
    listener.settimeout(None)
    poll = select.poll()
    for fd in (listener.fileno(), lifeline):
        os.set_inheritable(fd, False)
        poll.register(fd, select.POLLIN)
    if direct:
        _descendants().become_subreaper()
    signal.signal(signal.SIGCHLD, _reap)
    while True:
        ready = [fd for fd, _ in poll.poll()]
        if lifeline in ready:
            if direct:
                _descendants().kill_descendants()
            return
        try:
            # Its own accept is made by the module socket.
            connection = Socket(fileno=listener._accept()[0])  # pyright: ignore[reportAttributeAccessIssue, reportUnknownArgumentType]
        except OSError:
            time.sleep(0.05)
            continue
        _serve_apart(connection, listener)


def _is_direct() -> bool:
    return "direct" in sys.argv[4:]


def _descendants() -> ModuleType:
    """The module, which is there only where the package is: without isolation."""
    sys.path.append(os.path.dirname(__file__))
    import descendants

    return descendants


def _pids() -> list[str]:
    try:
        return [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []


def _session(leader: int) -> list[int]:
    """The processes of a session that still run."""
    found: list[int] = []
    for pid in _pids():
        with Ignored(OSError, IndexError, ValueError):
            state, _, _, session = _stat_fields(pid)[:4]
            if int(session) == leader and state != "Z":
                found.append(int(pid))
    return found


def _stat_fields(pid: str) -> list[str]:
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
        return file.read().rpartition(")")[2].split()


def _reap(_signum: int, _frame: object) -> None:
    with Ignored(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _serve_apart(connection: Socket, listener: Socket) -> None:
    request = None
    with Ignored(OSError, EOFError, ValueError):
        request = _small_request(connection)
        if request is not None and _serve_at_once(connection, *request):
            connection.close()
            return
    try:
        pid = os.fork()
    except OSError:
        # No further process is allowed: files can still be read and written from here.
        _serve(connection, request, may_fork=False)
        connection.close()
        return
    if pid:
        connection.close()
        return
    try:
        listener.close()
        _serve(connection, request, may_fork=True)
    finally:
        os._exit(0)


def _small_request(connection: Socket) -> tuple[Message, bytes] | None:
    """A small request, if one is there already; None leaves all of it to be received."""
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    if not poll.poll(AT_ONCE_MS):
        return None
    flags = MSG_PEEK | MSG_DONTWAIT
    waiting = connection.recv(SMALL_REQUEST_BYTES, flags)
    if len(waiting) < LENGTHS.size:
        return None
    header_length, body_length = LENGTHS.unpack(waiting[: LENGTHS.size])
    body_begin = LENGTHS.size + header_length
    if len(waiting) < body_begin + body_length:
        return None
    data = _receive(connection, body_begin + body_length)
    return _parsed(data[LENGTHS.size : body_begin]), data[body_begin:]


def _serve_at_once(connection: Socket, request: Message, body: bytes) -> bool:
    """Answer what can't block and fits into the socket's buffer, without a process of its own.

    An agent's output is asked for many times a second; a process each would cost more than the
    agent's own start.
    """
    if request["op"] == "ping":
        _send(connection, {}, b"")
        return True
    if request["op"] == "write":
        try:
            _write(request["path"], (body,))
        except OSError as error:
            _send(connection, _failure(error), b"")
        else:
            _send(connection, {}, b"")
        return True
    if request["op"] == "read":
        try:
            limit = min(request["max"], SMALL_ANSWER_BYTES + 1)
            body = _read(request["path"], request["offset"], limit)
        except OSError as error:
            _send(connection, _failure(error), b"")
            return True
        if len(body) <= SMALL_ANSWER_BYTES:
            _send(connection, {}, body)
            return True
    return False


def _serve(connection: Socket, request: tuple[Message, bytes] | None, *, may_fork: bool) -> None:
    with Ignored(OSError, EOFError):
        connection.settimeout(TRANSFER_SECONDS)
        try:
            if request is not None:
                header, body = _answer(connection, *request, may_fork=may_fork)
            else:
                header, body = _received(connection, may_fork=may_fork)
        except (OSError, ValueError, TypeError, KeyError) as error:
            header, body = _failure(error), b""
        _send(connection, header, body)


def _received(connection: Socket, *, may_fork: bool) -> tuple[Message, bytes]:
    """Receive a request and answer it; a file's content is written as it comes."""
    header_length, left = LENGTHS.unpack(_receive(connection, LENGTHS.size))
    request = _parsed(_receive(connection, header_length))
    if request["op"] != "write":
        return _answer(connection, request, _receive(connection, left), may_fork=may_fork)

    def parts() -> Iterator[bytes]:
        nonlocal left
        while left:
            part = _receive(connection, min(left, 1 << 20))
            left -= len(part)
            yield part

    content = parts()
    try:
        _write(request["path"], content)
    except OSError:
        # The host sends all before it listens to the answer.
        for _ in content:
            pass
        raise
    return {}, b""


def _failure(error: Exception) -> Message:
    if isinstance(error, OSError):
        return {"error": errno.errorcode.get(error.errno or 0, "EIO"), "message": str(error)}
    return {"error": "EINVAL", "message": str(error)}


def _send(connection: Socket, header: Message, body: bytes) -> None:
    data = _written(header)
    connection.sendall(LENGTHS.pack(len(data), len(body)) + data + body)


def _answer(
    connection: Socket, request: Message, body: bytes, *, may_fork: bool
) -> tuple[Message, bytes]:
    op = request["op"]
    if op == "run":
        return _Run(connection, request, body).result(may_fork=may_fork)
    if op == "read":
        return {}, _read(request["path"], request["offset"], request["max"])
    if op == "resources":
        return {"cpu_seconds": _cpu_seconds()}, b""
    if op == "ping":
        return {}, b""
    message = f"unknown operation {op!r}"
    raise ValueError(message)


def _receive(connection: Socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(min(1 << 20, length - len(data)))
        if not part:
            raise EOFError
        data += part
    return bytes(data)


def _read(path: str, offset: int, limit: int) -> bytes:
    # A pipe or a device in the file's place must not block.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EISDIR, "not a regular file", path)
        os.lseek(fd, offset, os.SEEK_SET)
        data = bytearray()
        while len(data) < limit:
            part = os.read(fd, min(1 << 20, limit - len(data)))
            if not part:
                break
            data += part
        return bytes(data)
    finally:
        os.close(fd)


def _write(path: str, parts: Iterable[bytes]) -> None:
    folder = os.path.dirname(path)
    temporary = os.path.join(folder, f".sandbox-{os.getpid()}-{time.monotonic_ns():x}")
    try:
        os.makedirs(folder, exist_ok=True)
        mode = _mode(path)
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
        try:
            for part in parts:
                left = memoryview(part)
                while left:
                    left = left[os.write(fd, left) :]
        finally:
            os.close(fd)
        os.rename(temporary, path)
    finally:
        with Ignored(OSError):
            os.unlink(temporary)


def _mode(path: str) -> int:
    try:
        found = os.lstat(path).st_mode
    except OSError:
        return 0o644
    return stat.S_IMODE(found) if stat.S_ISREG(found) else 0o644


def _cpu_seconds() -> float:
    """Processor time of the sandbox's processes and of all that they waited for."""
    ticks = 0
    # Without isolation /proc shows those of the whole machine.
    for pid in map(str, _descendants().family(SHIM_PID)) if _is_direct() else _pids():
        with Ignored(OSError, IndexError, ValueError):
            ticks += sum(map(int, _stat_fields(pid)[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


class _Stream:
    """One output of a command, kept up to a bound."""

    def __init__(self, limit: int) -> None:
        self.read_fd, self.write_fd = os.pipe()
        os.set_blocking(self.read_fd, False)
        self.kept = bytearray()
        self.limit = limit
        self.truncated = False

    def pull(self) -> bool:
        """Take what is there; False at the end."""
        try:
            data = os.read(self.read_fd, CHUNK)
        except BlockingIOError:
            return True
        room = self.limit - len(self.kept)
        self.kept += data[:room]
        self.truncated = self.truncated or len(data) > room
        return bool(data)


class _Run:
    """One command, from its start to the answer."""

    def __init__(self, connection: Socket, request: Message, stdin: bytes) -> None:
        self.connection = connection
        self.request = request
        self.stdin = memoryview(stdin)
        self.exit_code: int | None = None
        self.timed_out = False
        self.poll = select.poll()

    def result(self, *, may_fork: bool) -> tuple[Message, bytes]:
        """Run it and say what came of it."""
        limit: int = self.request["max_output"]
        self.streams = {stream.read_fd: stream for stream in (_Stream(limit), _Stream(limit))}
        out, err = self.streams.values()
        if not may_fork:
            self._refuse(err, EXIT_NOT_EXECUTABLE, NO_PROCESS)
        else:
            try:
                self._start(out, err)
            except OSError as error:
                self._refuse(err, _code_of(error, self.request), str(error))
            except (ValueError, TypeError, IndexError) as error:
                self._refuse(err, EXIT_NOT_EXECUTABLE, str(error))
            else:
                self._follow()
        header: Message = {
            "exit_code": EXIT_TIMED_OUT if self.timed_out else self.exit_code,
            "timed_out": self.timed_out,
            "truncated": out.truncated or err.truncated,
            "stdout": len(out.kept),
        }
        return header, bytes(out.kept + err.kept)

    def _refuse(self, err: _Stream, code: int, reason: str) -> None:
        self.exit_code = code
        said = f"sandbox: cannot start a process: {reason}\n"
        err.kept += said.encode("utf-8", "surrogateescape")[: err.limit]

    def _start(self, out: _Stream, err: _Stream) -> None:
        self.deadline = time.monotonic() + float(self.request["timeout"])
        self.wake_fd, wake = os.pipe()
        for fd in (self.wake_fd, wake):
            os.set_blocking(fd, False)
        signal.signal(signal.SIGCHLD, lambda _signum, _frame: None)
        signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        stdin, self.stdin_fd = os.pipe()
        self.pid = _spawn(self.request, (stdin, out.write_fd, err.write_fd))
        for fd in (stdin, out.write_fd, err.write_fd):
            os.close(fd)
        os.set_blocking(self.stdin_fd, False)
        for fd in (self.wake_fd, self.connection.fileno(), *self.streams):
            self.poll.register(fd, select.POLLIN)
        self.poll.register(self.stdin_fd, select.POLLOUT)
        self._feed()

    def _follow(self) -> None:
        """Move the data until the command ended and its output, or our patience, did too."""
        idle_end = hard_end = 0.0
        while self.exit_code is None or self.streams_open():
            now = time.monotonic()
            if self.exit_code is None and now >= self.deadline:
                self.timed_out = True
                self._kill()
            elif self.exit_code is not None and now >= min(idle_end, hard_end):
                return
            end = self.deadline if self.exit_code is None else min(idle_end, hard_end)
            moved = self._step(max(0.0, end - now))
            if self.exit_code is not None:
                hard_end = hard_end or time.monotonic() + GRACE_SECONDS
                if moved or not idle_end:
                    idle_end = time.monotonic() + IDLE_GRACE_SECONDS

    def streams_open(self) -> bool:
        return any(stream.write_fd >= 0 for stream in self.streams.values())

    def _step(self, seconds: float) -> bool:
        moved = False
        for fd, _event in self.poll.poll(seconds * 1000):
            if fd in self.streams:
                moved = True
                if not self.streams[fd].pull():
                    self.streams[fd].write_fd = -1
                    self.poll.unregister(fd)
            elif fd == self.stdin_fd:
                self._feed()
            elif fd == self.wake_fd:
                os.read(fd, CHUNK)
                self._reap()
            else:
                # The host hung up: nobody waits for this command any more.
                self._kill()
                raise EOFError
        return moved

    def _feed(self) -> None:
        try:
            while self.stdin:
                self.stdin = self.stdin[os.write(self.stdin_fd, self.stdin[:CHUNK]) :]
        except BlockingIOError:
            return
        except OSError:
            self.stdin = self.stdin[:0]
        self.poll.unregister(self.stdin_fd)
        os.close(self.stdin_fd)
        self.stdin_fd = -1

    def _reap(self) -> None:
        if self.exit_code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                code = os.waitstatus_to_exitcode(status)
                self.exit_code = code if code >= 0 else 128 - code

    def _kill(self) -> None:
        """Kill the command's session, again until no process of it is left."""
        end = time.monotonic() + GRACE_SECONDS
        while True:
            with Ignored(OSError):
                os.killpg(self.pid, signal.SIGKILL)
            left = _session(self.pid)
            for pid in left:
                with Ignored(OSError):
                    os.kill(pid, signal.SIGKILL)
            self._reap()
            if (not left and self.exit_code is not None) or time.monotonic() > end:
                self.exit_code = 128 + signal.SIGKILL if self.exit_code is None else self.exit_code
                return
            time.sleep(0.002)


def _spawn(request: Message, fds: tuple[int, int, int]) -> int:
    """Start the command in a session of its own; this process has no other use for its folder.

    Not by a fork, which would copy this process first.
    """
    os.chdir(request["cwd"])
    argv: list[str] = request["argv"]
    env: dict[str, str] = request["env"]
    # Programs are searched for on this process's PATH.
    os.environ.update(env)
    return os.posix_spawnp(
        argv[0],
        argv,
        os.environ,
        file_actions=[(os.POSIX_SPAWN_DUP2, fd, target) for target, fd in enumerate(fds)],
        setsid=True,
        setsigdef=[signal.SIGCHLD, signal.SIGPIPE, signal.SIGXFSZ],
    )


def _code_of(error: OSError, request: Message) -> int:
    """As a shell reports that a command can't be started."""
    missing = error.errno in (errno.ENOENT, errno.ENOTDIR) or not _is_somewhere(request)
    return EXIT_NOT_FOUND if missing else EXIT_NOT_EXECUTABLE


def _is_somewhere(request: Message) -> bool:
    """Whether the program exists: a folder that may not be searched says EACCES for any name."""
    folders = os.get_exec_path({**os.environ, **request["env"]})
    program = request["argv"][0]
    return "/" in program or any(os.path.lexists(os.path.join(f, program)) for f in folders)


if __name__ == "__main__":
    main()
