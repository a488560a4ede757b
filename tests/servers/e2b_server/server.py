"""The server: control plane, envd and administration on one port."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
import socket
import tempfile
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from tests.servers.e2b_server import control_plane, envd
from tests.servers.e2b_server.faults import Fault, FaultMiddleware, FaultScript
from tests.servers.e2b_server.ledger import Ledger
from tests.servers.e2b_server.world import Limits, World

API_KEY = "e2b_0123456789abcdef0123456789abcdef01234567"
TEMPLATES = frozenset({"base", "claude"})
T = TypeVar("T")


class E2BServer:
    """Serves while entered, in a thread with its own event loop.

    So it answers from tests of any kind, also while they block. Tests of asyncio may use
    `async with`, which doesn't block their loop.

    Args:
        port: 0 takes a free one.
        api_key: the only one that is accepted.
        ledger_path: JSONL copy of the ledger.
        programs: name to file of this machine, on the PATH of every sandbox.
        internet: name to base URL; all that sandboxes reach, by `http://NAME:8080`. Empty: the
            network of this machine.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        api_key: str = API_KEY,
        limits: Limits | None = None,
        templates: frozenset[str] = TEMPLATES,
        ledger_path: Path | None = None,
        programs: Mapping[str, Path] | None = None,
        internet: Mapping[str, str] | None = None,
    ) -> None:
        self.api_key = api_key
        self.ledger = Ledger(ledger_path)
        self.faults = FaultScript()
        self._root = Path(tempfile.mkdtemp(prefix="e2b-server-"))
        self._world = World(
            self._root,
            self.ledger,
            limits=limits or Limits(),
            templates=templates,
            programs=programs or {},
            internet=internet or {},
        )
        self._socket = socket.create_server(("127.0.0.1", port), backlog=512)
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="e2b-server", daemon=True)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: uvicorn.Server | None = None

    @property
    def environ(self) -> Mapping[str, str]:
        """What points the SDK here."""
        return {
            "E2B_API_KEY": self.api_key,
            "E2B_API_URL": self.url,
            "E2B_SANDBOX_URL": self.url,
        }

    def __enter__(self) -> Self:
        self._thread.start()
        if not self._ready.wait(30):
            msg = "the E2B test server didn't start"
            raise RuntimeError(msg)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._server is not None:
            self._server.should_exit = True
        self._thread.join(30)
        self._socket.close()
        shutil.rmtree(self._root, ignore_errors=True)

    async def __aenter__(self) -> Self:
        return await asyncio.to_thread(self.__enter__)

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.to_thread(self.__exit__, kind, error, traceback)

    def add_rows(self, count: int, metadata: Mapping[str, str]) -> list[str]:
        """Sandboxes without processes, for tests of lists."""
        return self._call(lambda: [self._world.add_row(metadata) for _ in range(count)])

    async def ended(self, sandbox_ids: Sequence[str], *, seconds: float) -> None:
        """Wait until none of them is alive.

        Raises:
            TimeoutError: one still is.
        """
        async with asyncio.timeout(seconds):
            while set(sandbox_ids) & set(self.ledger.live()):
                await asyncio.sleep(0.05)

    def vanish(self, sandbox_id: str) -> None:
        """End a sandbox as E2B sometimes does: unasked and untold."""
        self._do(self._world.end(sandbox_id, "vanished"))

    def pause(self, sandbox_id: str) -> None:
        """Pause a sandbox behind everybody's back."""
        self._call(lambda: setattr(self._world.find(sandbox_id), "state", "paused"))

    def process_count(self, sandbox_id: str) -> int:
        """Processes alive inside."""
        machine = self._call(lambda: self._world.find(sandbox_id).machine)
        return machine.process_count() if machine is not None else 0

    @property
    def request_bodies(self) -> list[dict[str, Any]]:
        """What the create calls asked for, as it came."""
        return list(self._world.request_bodies)

    def stray_processes(self, mark: str) -> list[str]:
        """Processes of this machine with this text on their command line."""
        found: list[str] = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                found += [line] if mark in line else []
        return found

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return self._do(call())

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        loop = self._loop
        if loop is None:
            msg = "the E2B test server isn't running"
            raise RuntimeError(msg)
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        app = Starlette(
            routes=[
                *control_plane.routes(self._world, self.api_key),
                *envd.routes(self._world),
                Route("/admin/faults", self._admin_faults, methods=["POST", "DELETE"]),
                Route("/admin/ledger", self._admin_ledger, methods=["GET"]),
                Route("/admin/vanish/{sandbox_id}", self._admin_vanish, methods=["POST"]),
            ]
        )
        wrapped = FaultMiddleware(app, self.faults, self.ledger)
        config = uvicorn.Config(
            wrapped,
            http="h11",
            ws="none",
            lifespan="off",
            log_level="critical",
            timeout_graceful_shutdown=1,
        )
        server = _Server(config, self._ready)
        self._server = server
        try:
            await server.serve(sockets=[self._socket])
        finally:
            await self._world.shut_down()

    async def _admin_faults(self, request: Request) -> Response:
        if request.method == "DELETE":
            self.faults.clear()
        else:
            self.faults.add(*(Fault(**rule) for rule in json.loads(await request.body())))
        return Response(status_code=204)

    async def _admin_ledger(self, _request: Request) -> Response:
        return JSONResponse([asdict(entry) for entry in self.ledger.entries()])

    async def _admin_vanish(self, request: Request) -> Response:
        done = await self._world.end(request.path_params["sandbox_id"], "vanished")
        return Response(status_code=204 if done else 404)


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, ready: threading.Event) -> None:
        super().__init__(config)
        self._ready = ready

    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        # Signals belong to the test's own process, and this is not its main thread.
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready.set()
