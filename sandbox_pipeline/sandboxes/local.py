"""Sandboxes on this machine: bubblewrap around each, a supervisor beside it, a shim inside.

`<root>/<sandbox_id>/` is a sandbox, `<root>/bases/<name>/home` a snapshot. With
`isolation: none` the sandbox's home is not at `/home/user`: every mention of that path in
`argv`, `cwd` and `env`, and the paths of `read` and `write`, are translated. What files
contain is not; use `$HOME` in scripts.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar, cast

from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.sandboxes import bubblewrap, shim, supervisor
from sandbox_pipeline.sandboxes.base import (
    HOME,
    STATE_DIR,
    WORKSPACE,
    Command,
    CommandResult,
    Resources,
    Sandbox,
    SandboxInfo,
    SandboxSpec,
)
from sandbox_pipeline.sandboxes.folder import SANDBOX_ID, Meta, SandboxFolder, copy_command
from sandbox_pipeline.sandboxes.limits import (
    LimitPlan,
    cgroup_usage,
    plan_limits,
    remove_cgroups,
)

LEASE_ID = re.compile(r"[a-z0-9-]{1,63}")
BASE_NAME = re.compile(r"base-[a-z0-9-]{1,63}")
START_SECONDS = 20.0
ANSWER_SECONDS = 30.0
END_SECONDS = 15.0
TERM_SECONDS = 8.0
LAST_WORDS_SECONDS = 2.0
KEEP_ENDED_SECONDS = 86_400.0
LONGEST_HEADER_BYTES = 65_536
HOST_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE, errno.EROFS, errno.EACCES)
NO_FILE = ("ENOENT", "ENOTDIR", "EISDIR", "ELOOP", "EACCES", "ENAMETOOLONG", "ENXIO")

T = TypeVar("T")


class LocalSandbox:
    """One live sandbox on this machine. What it answers is not to be trusted, only bounded."""

    def __init__(self, folder: SandboxFolder, meta: Meta) -> None:
        self.folder = folder
        self._meta = meta
        self._translate = _translator(folder.home) if meta.isolation == "none" else _same

    @property
    def sandbox_id(self) -> str:
        return self.folder.sandbox_id

    async def run(self, command: Command) -> CommandResult:
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
        header = {"op": "read", "path": self._translate(path), "offset": offset, "max": max_bytes}
        answer, body = await self._call(header, most_bytes=max_bytes)
        if answer.get("error") in NO_FILE:
            raise FileNotFoundError(errno.ENOENT, _text(answer.get("message")), path)
        self._check(answer)
        return body

    async def write(self, path: str, data: bytes) -> None:
        seconds = ANSWER_SECONDS + len(data) / 5e6
        answer, _ = await self._call({"op": "write", "path": self._translate(path)}, data, seconds=seconds)
        self._check(answer)

    async def extend(self, ttl_seconds: float) -> None:
        if not self.folder.extend(ttl_seconds):
            raise self._gone()

    async def resources(self) -> Resources:
        used = cgroup_usage(tuple(map(Path, self._meta.cgroups)))
        if used.cpu_seconds is None:
            answer, _ = await self._call({"op": "resources"})
            cpu_seconds = answer.get("cpu_seconds")
            if isinstance(cpu_seconds, int | float) and 0 <= cpu_seconds < float("inf"):
                used = replace(used, cpu_seconds=float(cpu_seconds))
        if not self.folder.is_alive():
            raise self._gone()
        with contextlib.suppress(OSError, supervisor.TooDeepError):
            size = await asyncio.to_thread(supervisor.tree_bytes, str(self.folder.home))
            used = replace(used, disk_bytes=size)
        return used

    async def ping(self, seconds: float) -> None:
        """Return once the shim answers."""
        await self._call({"op": "ping"}, seconds=seconds)

    def _check(self, answer: Mapping[str, object]) -> None:
        if "error" in answer:
            message = f"{self.sandbox_id}: {_text(answer.get('message'))}"
            raise ProviderError(ErrorKind.UNAVAILABLE, message)

    async def _understood(self, parse: Callable[[], T]) -> T:
        try:
            return parse()
        except (ValueError, TypeError, KeyError) as error:
            message = f"the sandbox answered nonsense: {_text(error)}"
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
        except (OSError, EOFError, ValueError, struct.error) as error:
            reason = f"did not answer properly: {_text(error) or type(error).__name__}"
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


class LocalProvider:
    """Makes, finds and ends sandboxes of this machine.

    Args:
        root: folder of all local sandboxes of the deployment; made when needed.
        bwrap: the bubblewrap to use; by default the first that works.
    """

    name = "local"

    def __init__(self, root: Path, *, bwrap: Path | None = None) -> None:
        self.root = root.absolute()
        self._bwrap = bwrap

    async def create(self, spec: SandboxSpec) -> Sandbox:
        if not LEASE_ID.fullmatch(spec.lease_id):
            message = f"lease_id {spec.lease_id!r} must be 1 to 63 of a-z, 0-9 and '-'"
            raise ProviderError(ErrorKind.INVALID, message)
        bwrap = await self._isolation(spec)
        folder = SandboxFolder(self.root / f"local-{spec.lease_id}")
        start = _Start(folder, spec, bwrap)
        end = time.monotonic() + START_SECONDS
        with _host_errors(f"cannot create {folder.sandbox_id}"):
            try:
                while not await _to_end(asyncio.to_thread(start.claim, self.root)):
                    adopted = await self._adopt(folder, end)
                    if adopted is not None:
                        return adopted
                await self._copy_base(spec, folder)
                await _to_end(asyncio.to_thread(start.launch))
                sandbox = LocalSandbox(folder, start.meta)
                await sandbox.ping(START_SECONDS)
            except BaseException as error:
                await _to_end(self._abandon(start))
                raise _start_failure(error) from error
        return sandbox

    async def connect(self, sandbox_id: str) -> Sandbox:
        folder = self._folder(sandbox_id)
        adopted = await self._adopt(folder, time.monotonic() + START_SECONDS)
        if adopted is None:
            raise gone(folder)
        return adopted

    async def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        found, ended = await asyncio.to_thread(self._scan)
        for folder in ended:
            await asyncio.to_thread(_tidy, folder)
        return [info for info in found if metadata.items() <= info.metadata.items()]

    async def kill(self, sandbox_id: str) -> bool:
        folder = self._folder(sandbox_id)
        was_alive = folder.is_alive()
        await self._end(folder)
        await _to_end(asyncio.to_thread(_remove, folder))
        return was_alive

    async def snapshot(self, sandbox: Sandbox) -> str:
        folder = self._folder(sandbox.sandbox_id)
        name = f"base-{folder.sandbox_id.removeprefix('local-')}"
        place = self.root / "bases" / name
        if folder.is_alive():
            folder.keep_home()
            await self._end(folder)
        with _host_errors(f"cannot keep {name}"):
            if not folder.home.is_dir() or not (folder.path / "keep").exists():
                if place.is_dir():
                    return name
                raise gone(folder)
            place.mkdir(mode=0o700, parents=True, exist_ok=True)
            await _to_end(asyncio.to_thread(_move_home, folder, place))
        return name

    async def discard_base(self, name: str) -> None:
        """Remove a snapshot; nothing happens when there is none."""
        place = self._base(name)
        await _to_end(asyncio.to_thread(supervisor.remove_tree, str(place)))

    async def close(self) -> None:
        """Nothing is held between calls."""

    def _folder(self, sandbox_id: str) -> SandboxFolder:
        if not SANDBOX_ID.fullmatch(sandbox_id):
            message = f"{sandbox_id[:100]!r} is not the name of a local sandbox"
            raise ProviderError(ErrorKind.INVALID, message)
        return SandboxFolder(self.root / sandbox_id)

    def _base(self, name: str) -> Path:
        if not BASE_NAME.fullmatch(name):
            message = f"{name[:100]!r} is not the name of a local snapshot"
            raise ProviderError(ErrorKind.INVALID, message)
        return self.root / "bases" / name

    async def _isolation(self, spec: SandboxSpec) -> Path | None:
        """The bubblewrap to use; None where none is wanted."""
        if spec.config.isolation == "none":
            return None
        if self._bwrap is not None:
            return self._bwrap
        probe = await asyncio.to_thread(bubblewrap.probe_isolation)
        if probe.bwrap is None:
            raise ProviderError(ErrorKind.HOST, probe.message)
        return probe.bwrap

    async def _adopt(self, folder: SandboxFolder, end: float) -> LocalSandbox | None:
        """The sandbox that lives here already, once it answers; None when there is none."""
        while folder.is_locked():
            meta = folder.meta()
            if meta is not None and (folder.path / "pid").exists() and folder.is_alive():
                sandbox = LocalSandbox(folder, meta)
                try:
                    await sandbox.ping(max(0.1, end - time.monotonic()))
                except ProviderError as error:
                    if error.kind is not ErrorKind.GONE:
                        raise
                else:
                    return sandbox
            if time.monotonic() > end:
                message = f"{folder.sandbox_id} is being created or ended and does not get done"
                raise ProviderError(ErrorKind.AMBIGUOUS, message)
            await asyncio.sleep(0.01)
        return None

    async def _copy_base(self, spec: SandboxSpec, folder: SandboxFolder) -> None:
        if spec.base is None:
            folder.home.mkdir(mode=0o700)
        else:
            source = self._base(spec.base) / "home"
            if not source.is_dir():
                message = f"snapshot {spec.base!r} does not exist"
                raise ProviderError(ErrorKind.INVALID, message)
            await _run_to_end(copy_command(source, folder.home))
        for inside in (WORKSPACE, STATE_DIR):
            with contextlib.suppress(FileExistsError):
                (folder.home / Path(inside).relative_to(HOME)).mkdir()

    async def _abandon(self, start: _Start) -> None:
        """End what was started and leave nothing of it; what others started is not touched."""
        if not start.claimed:
            return
        with contextlib.suppress(ProviderError, OSError):
            await asyncio.to_thread(start.release)
            if start.launched:
                await self._end(start.folder)
            await asyncio.to_thread(_remove, start.folder)

    async def _end(self, folder: SandboxFolder) -> None:
        """Have the supervisor end the sandbox, or end the supervisor; return once it is gone."""
        begin = time.monotonic()
        pause, signalled = 0.002, False
        while folder.is_locked():
            waited = time.monotonic() - begin
            if waited > END_SECONDS:
                message = f"{folder.sandbox_id} does not end"
                raise ProviderError(ErrorKind.AMBIGUOUS, message)
            if (folder.path / "ended.json").exists():
                # Nothing runs any more; the supervisor is removing what there was.
                if waited > TERM_SECONDS:
                    return
            elif waited > TERM_SECONDS:
                folder.end(signal.SIGKILL)
            elif not signalled:
                signalled = folder.end(signal.SIGTERM)
            await asyncio.sleep(pause)
            pause = min(0.05, pause * 1.5)

    def _scan(self) -> tuple[list[SandboxInfo], list[SandboxFolder]]:
        """What lives, and the folders of what no longer does."""
        found: list[SandboxInfo] = []
        ended: list[SandboxFolder] = []
        with contextlib.suppress(FileNotFoundError):
            for path in self.root.iterdir():
                folder = SandboxFolder(path)
                if not SANDBOX_ID.fullmatch(path.name) or path.is_symlink():
                    continue
                meta = folder.meta()
                if not folder.is_locked():
                    ended.append(folder)
                elif meta is not None and folder.is_alive():
                    found.append(
                        SandboxInfo(path.name, meta.metadata, meta.started_at, folder.expires_at())
                    )
        return found, ended


class _Start:
    """The start of one sandbox, step by step, so that it can be undone at any point."""

    def __init__(self, folder: SandboxFolder, spec: SandboxSpec, bwrap: Path | None) -> None:
        self.folder = folder
        self.spec = spec
        self.bwrap = bwrap
        self.claimed = False
        self.launched = False
        self._lock: int | None = None
        name = f"{folder.sandbox_id}-{zlib.crc32(os.fsencode(folder.path)):08x}"
        self.plan: LimitPlan = plan_limits(spec.config, f"sandbox-pipeline-{name}")
        self.meta = Meta(
            sandbox_id=folder.sandbox_id,
            metadata=dict(spec.metadata),
            started_at=time.time(),
            isolation=spec.config.isolation,
            cgroups=[str(group) for group in self.plan.cgroups],
        )

    def claim(self, root: Path) -> bool:
        """Take the folder, write down what it is for; False when the sandbox exists already."""
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = self.folder.claim()
        if self._lock is None:
            return False
        self.claimed = True
        self.folder.write_meta(self.meta)
        return True

    def release(self) -> None:
        """Let go of the lock, which the supervisor then holds alone."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def launch(self) -> None:
        """Start the supervisor, which starts the sandbox."""
        folder = self.folder
        path = folder.path
        descriptors: list[int] = []
        folder.extend(self.spec.ttl_seconds)
        try:
            argv, env = self._direct() if self.bwrap is None else self._isolated(descriptors)
            with folder.listen() as listener, (path / "supervisor.err").open("wb") as errors:
                lock = cast("int", self._lock)
                options = [f"folder={path}", f"lock_fd={lock}", f"listen_fd={listener.fileno()}"]
                if self.bwrap is None:
                    options.append("direct=1")
                else:
                    options.append(f"args_fd={descriptors[0]}")
                options += [f"env={name}={value}" for name, value in env.items()]
                options += self._limit_options()
                program = [sys.executable, "-I", "-S", str(supervisor.__file__)]
                self.launched = True
                done = subprocess.run(  # noqa: S603 (our own file)
                    [*program, folder.sandbox_id, *options, "--", *argv],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=(lock, listener.fileno(), *descriptors),
                    start_new_session=True,
                    cwd="/",
                    env={},
                    check=False,
                )
                if done.returncode:
                    message = f"the supervisor cannot start (exit code {done.returncode})"
                    raise ProviderError(ErrorKind.HOST, message)
        finally:
            for fd in descriptors:
                os.close(fd)
            self.release()

    def _isolated(self, descriptors: list[int]) -> tuple[list[str], dict[str, str]]:
        path = self.folder.path
        etc = path / "etc"
        etc.mkdir()
        for name, text in bubblewrap.etc_files(self.spec).items():
            (etc / name).write_text(text, encoding="ascii")
        options = bubblewrap.sandbox_options(self.spec, path)
        file = path / "bwrap.args"
        file.write_bytes(b"".join(os.fsencode(option) + b"\0" for option in options))
        descriptors.append(os.open(file, os.O_RDONLY))
        return bubblewrap.command_line(cast("Path", self.bwrap)), {}

    def _direct(self) -> tuple[list[str], dict[str, str]]:
        bubblewrap.shown_paths(self.spec, self.folder.home)
        temporary = self.folder.path / "tmp"
        temporary.mkdir(mode=0o700)
        search_path = os.environ.get("PATH") or bubblewrap.PATH_INSIDE
        env = bubblewrap.environment(search_path, str(self.folder.home))
        program = [sys.executable, "-I", "-S", "-X", "utf8", str(shim.__file__)]
        argv = [*program, str(supervisor.LISTEN_FD), str(supervisor.THIRD_FD)]
        return argv, {**env, "TMPDIR": str(temporary)}

    def _limit_options(self) -> list[str]:
        plan = self.plan
        options = [f"rlimit={name}:{value}" for name, value in plan.rlimits]
        options += [f"cgroup={group}" for group in plan.cgroups]
        options += [f"cgroup_value={file}:{value}" for file, value in plan.cgroup_values]
        if self.spec.config.disk_mb is not None:
            options.append(f"disk_bytes={self.spec.config.disk_mb << 20}")
        return options


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
        await loop.sock_sendall(connection, shim.LENGTHS.pack(len(data), len(body)) + data)
        if body:
            await loop.sock_sendall(connection, body)
        lengths = await _receive(connection, shim.LENGTHS.size)
        header_length, body_length = shim.LENGTHS.unpack(lengths)
        if header_length > LONGEST_HEADER_BYTES or body_length > most_bytes:
            message = f"an answer of {header_length} + {body_length} bytes"
            raise ValueError(message)
        answer: Any = json.loads(await _receive(connection, header_length))
        if not isinstance(answer, dict):
            message = "not a mapping"
            raise ValueError(message)  # noqa: TRY004 (all nonsense alike)
        return cast("dict[str, object]", answer), await _receive(connection, body_length)


async def _receive(connection: Any, length: int) -> bytes:
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
    if not isinstance(exit_code, int) or not 0 <= exit_code <= 255:  # noqa: PLR2004
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


def _text(value: object) -> str:
    """Anything a sandbox said, fit for a message."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value)[:300])


def _start_failure(error: BaseException) -> BaseException:
    """What a failed start means, now that what was started is gone."""
    if isinstance(error, ProviderError):
        if error.kind is ErrorKind.GONE:
            return ProviderError(ErrorKind.HOST, f"the sandbox did not start: {error}")
        if error.kind is ErrorKind.AMBIGUOUS:
            return ProviderError(ErrorKind.UNAVAILABLE, f"the sandbox did not start: {error}")
    return error


@contextlib.contextmanager
def _host_errors(action: str):  # noqa: ANN202
    try:
        yield
    except OSError as error:
        raise ProviderError(ErrorKind.HOST, f"{action}: {error}") from error


async def _to_end(work: Awaitable[T]) -> T:
    """Await work that must not be left half done: a cancellation takes effect after it."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise


async def _run_to_end(argv: Sequence[str]) -> None:
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        _, stderr = await process.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        raise
    if process.returncode:
        raise ProviderError(ErrorKind.HOST, f"cannot copy: {_text(stderr.decode('utf-8', 'replace'))}")


def _remove(folder: SandboxFolder) -> None:
    meta = folder.meta()
    if meta is not None and not folder.is_locked():
        remove_cgroups(tuple(map(Path, meta.cgroups)))
    folder.remove()


def _move_home(folder: SandboxFolder, place: Path) -> None:
    supervisor.remove_tree(str(place / "home"))
    folder.home.rename(place / "home")
    _remove(folder)


def _tidy(folder: SandboxFolder) -> None:
    """Remove what ended long ago or was left by a supervisor that was killed."""
    with contextlib.suppress(OSError):
        ended = folder.path / "ended.json"
        if ended.exists() and time.time() - ended.stat().st_mtime < KEEP_ENDED_SECONDS:
            return
        if (folder.path / "keep").exists():
            return
        _remove(folder)
