"""The daemon inside each sandbox, as far as the SDK uses it; all share one port here.

Which sandbox a request is for comes from the header `E2b-Sandbox-Id`, as with E2B's shared
sandbox domain.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from typing import Any

from connectrpc.code import Code
from connectrpc.errors import ConnectError
from connectrpc.request import RequestContext
from e2b.envd.filesystem import filesystem_connect
from e2b.envd.filesystem import filesystem_pb as fs
from e2b.envd.process import process_connect
from e2b.envd.process import process_pb as ps
from protobuf import Oneof
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from tests.servers.e2b_server.machine import GuestError, Machine, Process
from tests.servers.e2b_server.world import World

CODES = {
    errno.ENOENT: Code.NOT_FOUND,
    errno.EEXIST: Code.ALREADY_EXISTS,
    errno.ENOTCONN: Code.UNAVAILABLE,
    errno.EINVAL: Code.INVALID_ARGUMENT,
}
STATUSES = {errno.ENOENT: 404, errno.EISDIR: 400, errno.ENOSPC: 507, errno.ENOTCONN: 502}


def routes(world: World) -> list[Route | Mount]:
    """The routes of envd, which act on this world."""
    find = _Finder(world)
    files = Files(find)
    processes = process_connect.ProcessASGIApplication(Processes(find))
    filesystem = filesystem_connect.FilesystemASGIApplication(Filesystem(find))
    return [
        Route("/health", files.health, methods=["GET"]),
        Route("/files", files.read, methods=["GET"]),
        Route("/files", files.write, methods=["POST"]),
        Mount(processes.path, Gate(find, processes)),
        Mount(filesystem.path, Gate(find, filesystem)),
    ]


class _Finder:
    def __init__(self, world: World) -> None:
        self._world = world

    def refusal(self, headers: Any) -> Response | None:
        """What E2B's proxy answers for a sandbox that is not running."""
        name = headers.get("e2b-sandbox-id") or ""
        sandbox = self._world.sandboxes.get(name)
        if sandbox is None or sandbox.machine is None or sandbox.state != "running":
            body = {"sandboxId": name, "message": "The sandbox was not found", "code": 502}
            return JSONResponse(body, 502)
        if headers.get("x-access-token") != sandbox.token:
            return JSONResponse({"code": 401, "message": "unauthorized access"}, 401)
        return None

    def machine(self, headers: Any) -> Machine:
        """The inside of the sandbox that a request is for."""
        sandbox = self._world.sandboxes.get(headers.get("e2b-sandbox-id") or "")
        if sandbox is None or sandbox.machine is None:
            raise ConnectError(Code.UNAVAILABLE, "The sandbox was not found")
        return sandbox.machine


class Gate:
    """Refuses calls to sandboxes that don't run before the RPC layer sees them."""

    def __init__(self, find: _Finder, app: Any) -> None:
        self._find = find
        self._app: ASGIApp = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._find.refusal(Request(scope).headers)
        await (refusal or self._app)(scope, receive, send)


class Files:
    """The HTTP part: health, downloads, uploads."""

    def __init__(self, find: _Finder) -> None:
        self._find = find

    async def health(self, request: Request) -> Response:
        return self._find.refusal(request.headers) or Response(status_code=204)

    async def read(self, request: Request) -> Response:
        if (refusal := self._find.refusal(request.headers)) is not None:
            return refusal
        machine = self._find.machine(request.headers)
        try:
            descriptor, entry = await machine.open(request.query_params["path"], write=False)
        except GuestError as error:
            return _refusal(error)

        async def chunks() -> AsyncIterator[bytes]:
            try:
                while data := await asyncio.to_thread(os.read, descriptor, 65_536):
                    yield data
            finally:
                os.close(descriptor)

        size = {"content-length": str(entry["size"])}
        return StreamingResponse(chunks(), media_type="application/octet-stream", headers=size)

    async def write(self, request: Request) -> Response:
        if (refusal := self._find.refusal(request.headers)) is not None:
            return refusal
        machine = self._find.machine(request.headers)
        if request.headers.get("content-type", "").startswith("multipart/"):
            uploads = _multipart(await request.body(), request.headers["content-type"])
            if (path := request.query_params.get("path")) is not None:
                uploads = [(path, data) for _, data in uploads]
        else:
            uploads = [(request.query_params["path"], await request.body())]
        written: list[dict[str, str]] = []
        for path, data in uploads:
            try:
                descriptor, entry = await machine.open(path, write=True)
            except GuestError as error:
                return _refusal(error)
            await asyncio.to_thread(_write_and_close, descriptor, data)
            written.append({"name": entry["name"], "path": path, "type": "file"})
        return JSONResponse(written)


def _refusal(error: GuestError) -> Response:
    status = STATUSES.get(error.errno, 500)
    return JSONResponse({"code": status, "message": str(error)}, status)


def _write_and_close(descriptor: int, data: bytes) -> None:
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


def _multipart(body: bytes, content_type: str) -> list[tuple[str, bytes]]:
    boundary = content_type.partition("boundary=")[2].strip('"').encode()
    parts: list[tuple[str, bytes]] = []
    for piece in body.split(b"--" + boundary)[1:-1]:
        head, _, data = piece.removeprefix(b"\r\n").partition(b"\r\n\r\n")
        name = head.decode().partition('filename="')[2].partition('"')[0]
        parts.append((name, data.removesuffix(b"\r\n")))
    return parts


async def _told(work: Any) -> Any:
    try:
        return await work
    except GuestError as error:
        code = CODES.get(error.errno, Code.INTERNAL)
        raise ConnectError(code, str(error)) from error


class Processes(process_connect.Process):
    """The RPC service `process.Process`."""

    def __init__(self, find: _Finder) -> None:
        self._find = find

    async def list(
        self, request: ps.ListRequest, ctx: RequestContext[ps.ListRequest, ps.ListResponse], /
    ) -> ps.ListResponse:
        machine = self._find.machine(ctx.request_headers)
        infos = [
            ps.ProcessInfo(pid=process.pid, config=ps.ProcessConfig(**process.config))
            for process in machine.processes.values()
        ]
        return ps.ListResponse(processes=infos)

    async def start(
        self, request: ps.StartRequest, ctx: RequestContext[ps.StartRequest, ps.StartResponse], /
    ) -> AsyncIterator[ps.StartResponse]:
        machine = self._find.machine(ctx.request_headers)
        config = request.process or ps.ProcessConfig()
        process = await _told(
            machine.spawn(
                config.cmd,
                config.args,
                envs=config.envs,
                cwd=config.cwd,
                stdin=request.stdin if request.has_field("stdin") else True,
            )
        )
        queue = process.from_the_start
        async for event in _events(machine, process, queue, ctx.timeout_ms, kill_at_end=True):
            yield ps.StartResponse(event=event)

    async def connect(
        self,
        request: ps.ConnectRequest,
        ctx: RequestContext[ps.ConnectRequest, ps.ConnectResponse],
        /,
    ) -> AsyncIterator[ps.ConnectResponse]:
        machine = self._find.machine(ctx.request_headers)
        process = self._process(machine, request.process)
        queue = process.watch()
        async for event in _events(machine, process, queue, ctx.timeout_ms, kill_at_end=False):
            yield ps.ConnectResponse(event=event)

    async def send_input(
        self,
        request: ps.SendInputRequest,
        ctx: RequestContext[ps.SendInputRequest, ps.SendInputResponse],
        /,
    ) -> ps.SendInputResponse:
        machine = self._find.machine(ctx.request_headers)
        process = self._process(machine, request.process)
        match request.input.input if request.input else None:
            case Oneof(field="stdin", value=data):
                await machine.write_stdin(process, data)
            case _:
                raise ConnectError(Code.UNIMPLEMENTED, "only stdin")
        return ps.SendInputResponse()

    async def close_stdin(
        self,
        request: ps.CloseStdinRequest,
        ctx: RequestContext[ps.CloseStdinRequest, ps.CloseStdinResponse],
        /,
    ) -> ps.CloseStdinResponse:
        machine = self._find.machine(ctx.request_headers)
        machine.close_stdin(self._process(machine, request.process))
        return ps.CloseStdinResponse()

    async def send_signal(
        self,
        request: ps.SendSignalRequest,
        ctx: RequestContext[ps.SendSignalRequest, ps.SendSignalResponse],
        /,
    ) -> ps.SendSignalResponse:
        machine = self._find.machine(ctx.request_headers)
        process = self._process(machine, request.process)
        await _told(machine.signal(process.pid, int(request.signal)))
        return ps.SendSignalResponse()

    def _process(self, machine: Machine, selector: ps.ProcessSelector | None) -> Process:
        match selector.selector if selector else None:
            case Oneof(field="pid", value=pid) if pid in machine.processes:
                return machine.processes[pid]
            case _:
                raise ConnectError(Code.NOT_FOUND, "process not found")


async def _events(
    machine: Machine,
    process: Process,
    queue: asyncio.Queue[tuple[str, bytes]],
    timeout_ms: float | None,
    *,
    kill_at_end: bool,
) -> AsyncIterator[ps.ProcessEvent]:
    loop = asyncio.get_running_loop()
    deadline = None if timeout_ms is None else loop.time() + timeout_ms / 1000
    try:
        start = ps.ProcessEvent.StartEvent(pid=process.pid)
        yield ps.ProcessEvent(event=Oneof("start", start))
        while True:
            try:
                async with asyncio.timeout_at(deadline):
                    stream, data = await queue.get()
            except TimeoutError:
                if kill_at_end:
                    await _told(machine.signal(process.pid, 9))
                raise ConnectError(Code.DEADLINE_EXCEEDED, "context deadline exceeded") from None
            if stream == "end":
                break
            if stream == "stdout":
                piece = ps.ProcessEvent.DataEvent(output=Oneof("stdout", data))
            else:
                piece = ps.ProcessEvent.DataEvent(output=Oneof("stderr", data))
            yield ps.ProcessEvent(event=Oneof("data", piece))
        if not machine.running:
            msg = "the connection to the sandbox ended before the stream completed"
            raise ConnectError(Code.UNAVAILABLE, msg)
        code = process.exit_code if process.exit_code is not None else -1
        end = ps.ProcessEvent.EndEvent(exit_code=code, exited=True, status=f"exit status {code}")
        if code:
            end.error = end.status
        yield ps.ProcessEvent(event=Oneof("end", end))
    finally:
        process.unwatch(queue)


class Filesystem(filesystem_connect.Filesystem):
    """The RPC service `filesystem.Filesystem`."""

    def __init__(self, find: _Finder) -> None:
        self._find = find

    async def stat(
        self, request: fs.StatRequest, ctx: RequestContext[fs.StatRequest, fs.StatResponse], /
    ) -> fs.StatResponse:
        found = await self._do(ctx, "stat", path=request.path)
        return fs.StatResponse(entry=_entry(found))

    async def make_dir(
        self,
        request: fs.MakeDirRequest,
        ctx: RequestContext[fs.MakeDirRequest, fs.MakeDirResponse],
        /,
    ) -> fs.MakeDirResponse:
        found = await self._do(ctx, "mkdir", path=request.path)
        return fs.MakeDirResponse(entry=_entry(found))

    async def move(
        self, request: fs.MoveRequest, ctx: RequestContext[fs.MoveRequest, fs.MoveResponse], /
    ) -> fs.MoveResponse:
        paths = {"source": request.source, "destination": request.destination}
        return fs.MoveResponse(entry=_entry(await self._do(ctx, "move", **paths)))

    async def list_dir(
        self,
        request: fs.ListDirRequest,
        ctx: RequestContext[fs.ListDirRequest, fs.ListDirResponse],
        /,
    ) -> fs.ListDirResponse:
        found = await self._do(ctx, "list", path=request.path)
        return fs.ListDirResponse(entries=[_entry(one) for one in found["entries"]])

    async def remove(
        self,
        request: fs.RemoveRequest,
        ctx: RequestContext[fs.RemoveRequest, fs.RemoveResponse],
        /,
    ) -> fs.RemoveResponse:
        await self._do(ctx, "remove", path=request.path)
        return fs.RemoveResponse()

    async def _do(self, ctx: Any, operation: str, **arguments: str) -> dict[str, Any]:
        return await _told(self._find.machine(ctx.request_headers).files(operation, **arguments))


def _entry(found: dict[str, Any]) -> fs.EntryInfo:
    kind = fs.FileType.DIRECTORY if found["type"] == "dir" else fs.FileType.FILE
    return fs.EntryInfo(
        name=found["name"], path=found["path"], type=kind, size=found["size"], mode=found["mode"]
    )
