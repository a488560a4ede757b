"""The egress proxy of one sandbox: what its network rules allow, with the headers they add.

Inside, an allowed name leads to a port of the sandbox's own loopback, from where everything goes
through a unix socket to here: a sandbox without a network has no other way out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

PORT = 8080
"""Inside: the upstream's base URL there is `http://NAME:8080`."""
HOP_BY_HOP = {"host", "connection", "transfer-encoding", "content-length", "accept-encoding"}
METHODS = ["GET", "HEAD", "POST", "PUT", "DELETE"]


class Egress:
    """Serves one sandbox.

    Args:
        path: of the socket; short.
        network: the sandbox's, as it was asked for.
        upstreams: name to base URL, of what there is in this small internet.
        note: hears name and headers of each request, as they left the sandbox.
    """

    def __init__(
        self,
        path: Path,
        network: Mapping[str, Any],
        upstreams: Mapping[str, str],
        note: Callable[[str, Mapping[str, str]], None],
    ) -> None:
        self.path = path
        self._network = network
        self._upstreams = upstreams
        self._note = note

    async def start(self) -> None:
        """Listen."""
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(self.path))
        app = Starlette(routes=[Route("/{path:path}", self._forward, methods=METHODS)])
        config = uvicorn.Config(
            app, http="h11", lifespan="off", log_level="critical", timeout_graceful_shutdown=1
        )
        self._server = _Server(config)
        self._client = httpx.AsyncClient(timeout=60, trust_env=False)
        self._serving = asyncio.get_running_loop().create_task(self._server.serve([listener]))

    async def stop(self) -> None:
        """Stop listening."""
        self._server.should_exit = self._server.force_exit = True
        await asyncio.wait({self._serving}, timeout=2)
        await self._client.aclose()

    async def _forward(self, request: Request) -> Response:
        name = request.headers.get("host", "").partition(":")[0]
        self._note(name, dict(request.headers))
        allowed = self._network.get("allowOut")
        if name not in self._upstreams or (allowed and name not in allowed):
            return JSONResponse({"message": f"egress to {name} is denied"}, 403)
        headers = {key: text for key, text in request.headers.items() if key not in HOP_BY_HOP}
        rules: Mapping[str, list[Any]] = self._network.get("rules") or {}
        for rule in rules.get(name, []):
            added: Mapping[str, str] = rule["transform"]["headers"]
            headers |= {key.lower(): text for key, text in added.items()}
        sent = self._client.build_request(
            request.method,
            f"{self._upstreams[name]}{request.url.path}",
            params=request.query_params,
            headers={**headers, "accept-encoding": "identity"},
            content=await request.body(),
        )
        answer = await self._client.send(sent, stream=True)
        kept = {key: text for key, text in answer.headers.items() if key not in HOP_BY_HOP}
        return StreamingResponse(_body(answer), answer.status_code, kept)


async def _body(answer: httpx.Response) -> AsyncIterator[bytes]:
    try:
        async for chunk in answer.aiter_raw():
            yield chunk
    finally:
        await answer.aclose()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield
