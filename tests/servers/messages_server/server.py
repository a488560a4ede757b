"""The server: `POST /v1/messages`, streaming and not, and the routes around it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.servers.messages_server.script import Charge, Fault, Reply, Script, read_ask, say, steps

ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    529: "overloaded_error",
}


@dataclass(frozen=True)
class LedgerEntry:
    """One request, as the server saw it.

    Attributes:
        key: the credential that came with it.
        charge: what the answer cost; None where nothing was answered.
    """

    method: str
    path: str
    key: str
    headers: Mapping[str, str]
    body: Mapping[str, Any]
    opening: str = ""
    turn: int = 0
    status: int = 200
    charge: Charge | None = None
    model: str = ""


@dataclass
class MessagesServer:
    """Serves on a free port of this machine while entered.

    Attributes:
        script: picks the answers.
        key: the only credential that is accepted; None: any.
        faults: used up one per `/v1/messages` request, before the script is asked.
        known_models: others get 404; None: all are known.
    """

    script: Script = field(default_factory=lambda: steps(say("done")))
    key: str | None = None
    faults: list[Fault] = field(default_factory=list[Fault])
    known_models: set[str] | None = None
    host: str = "127.0.0.1"
    port: int = 0
    ledger: list[LedgerEntry] = field(default_factory=list[LedgerEntry])

    _server: uvicorn.Server = field(init=False)
    _serving: asyncio.Task[None] = field(init=False)

    @property
    def url(self) -> str:
        """Base URL, for `ANTHROPIC_BASE_URL`."""
        return f"http://{self.host}:{self.port}"

    @property
    def answers(self) -> list[LedgerEntry]:
        """The requests to `/v1/messages`."""
        return [
            entry
            for entry in self.ledger
            if entry.method == "POST" and entry.path == "/v1/messages"
        ]

    def charged(self, marker: str = "") -> Charge:
        """All that was charged to the conversations whose opening has the marker."""
        total = Charge(0, 0, 0, 0)
        for entry in self.answers:
            if entry.charge is not None and marker in entry.opening:
                total += entry.charge
        return total

    async def __aenter__(self) -> Self:
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((self.host, self.port))
        self.port = listener.getsockname()[1]
        config = uvicorn.Config(
            self.app(), log_level="critical", lifespan="off", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._serving = asyncio.create_task(self._server.serve([listener]))
        while not self._server.started:
            await asyncio.sleep(0.005)
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        with contextlib.suppress(asyncio.CancelledError):
            await self._serving

    def app(self) -> Starlette:
        """The routes."""
        methods = ["GET", "HEAD", "POST", "PUT", "DELETE"]
        return Starlette(
            routes=[
                Route("/v1/messages", self._messages, methods=["POST"]),
                Route("/v1/messages/count_tokens", self._count_tokens, methods=["POST"]),
                Route("/v1/models", self._models, methods=["GET"]),
                Route("/{path:path}", self._other, methods=methods),
            ]
        )

    async def _messages(self, request: Request) -> Response:
        body = json.loads(await request.body())
        ask = read_ask(len(self.answers), body)
        model = str(body.get("model", ""))

        def note(status: int, charge: Charge | None = None) -> None:
            entry = LedgerEntry(
                request.method,
                request.url.path,
                _key(request),
                dict(request.headers),
                body,
                opening=ask.opening,
                turn=ask.turn,
                status=status,
                charge=charge,
                model=model,
            )
            self.ledger.append(entry)

        if self.key is not None and _key(request) != self.key:
            note(401)
            return _error(401, "invalid x-api-key")
        if self.known_models is not None and model not in self.known_models:
            note(404)
            return _error(404, f"model: {model}")
        reply = self.script(ask) if not self.faults else Reply(fault=self.faults.pop(0))
        fault = reply.fault or Fault()
        if fault.delay_seconds:
            await asyncio.sleep(fault.delay_seconds)
        if fault.status is not None:
            note(fault.status)
            return _faulty(fault)
        note(200, None if fault.breaks_stream else reply.charge)
        message = _message(reply, model, len(self.answers))
        if not body.get("stream"):
            return _error(529, fault.message) if fault.breaks_stream else JSONResponse(message)
        return StreamingResponse(
            _stream(message, reply.charge, fault), media_type="text/event-stream"
        )

    async def _count_tokens(self, request: Request) -> Response:
        await self._note_other(request)
        return JSONResponse({"input_tokens": 42})

    async def _models(self, request: Request) -> Response:
        await self._note_other(request)
        if self.key is not None and _key(request) != self.key:
            return _error(401, "invalid x-api-key")
        models = sorted(self.known_models or {"claude-sonnet-4-6"})
        data = [{"type": "model", "id": name, "display_name": name} for name in models]
        return JSONResponse({"data": data, "has_more": False})

    async def _other(self, request: Request) -> Response:
        await self._note_other(request)
        if request.method in ("GET", "HEAD"):
            return JSONResponse({})
        return _error(404, "no such route")

    async def _note_other(self, request: Request) -> None:
        entry = LedgerEntry(
            request.method, request.url.path, _key(request), dict(request.headers), {}
        )
        self.ledger.append(entry)


def _key(request: Request) -> str:
    bearer = request.headers.get("authorization", "")
    return request.headers.get("x-api-key") or bearer.removeprefix("Bearer ")


def _error(status: int, message: str) -> JSONResponse:
    error = {"type": ERROR_TYPES.get(status, "api_error"), "message": message}
    return JSONResponse({"type": "error", "error": error}, status)


def _faulty(fault: Fault) -> Response:
    status = fault.status or 500
    response = (
        _error(status, fault.message)
        if fault.body is None
        else Response(fault.body, status, media_type="text/html")
    )
    response.headers.update(fault.headers)
    return response


def _message(reply: Reply, model: str, number: int) -> dict[str, Any]:
    content: list[dict[str, Any]] = []
    if reply.text:
        content.append({"type": "text", "text": reply.text})
    for index, tool in enumerate(reply.tools):
        block_id = f"toolu_{number:04d}_{index:02d}"
        content.append(
            {"type": "tool_use", "id": block_id, "name": tool.name, "input": dict(tool.input)}
        )
    return {
        "id": f"msg_{number:06d}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": content,
        "stop_reason": reply.stop_reason,
        "stop_sequence": None,
        "usage": dict(vars(reply.charge)),
    }


async def _stream(message: Mapping[str, Any], charge: Charge, fault: Fault) -> AsyncIterator[bytes]:
    for count, event in enumerate(_events(message, charge)):
        if fault.event_delay_seconds:
            await asyncio.sleep(fault.event_delay_seconds)
        if fault.cut_after_events == count:
            msg = "scripted cut"
            raise ConnectionResetError(msg)
        if fault.error_after_events == count:
            error = {"type": "overloaded_error", "message": fault.message}
            yield _sse({"type": "error", "error": error})
            return
        yield _sse(event)


def _events(message: Mapping[str, Any], charge: Charge) -> list[dict[str, Any]]:
    start: dict[str, Any] = {**message, "content": [], "stop_reason": None}
    start["usage"] = {**vars(charge), "output_tokens": 1}
    events: list[dict[str, Any]] = [{"type": "message_start", "message": start}]
    for index, block in enumerate(message["content"]):
        if block["type"] == "text":
            empty: dict[str, Any] = {**block, "text": ""}
            delta = {"type": "text_delta", "text": block["text"]}
        else:
            empty = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        events.append({"type": "content_block_start", "index": index, "content_block": empty})
        events.append({"type": "content_block_delta", "index": index, "delta": delta})
        events.append({"type": "content_block_stop", "index": index})
    delta = {"stop_reason": message["stop_reason"], "stop_sequence": None}
    usage = {"output_tokens": charge.output_tokens}
    events.append({"type": "message_delta", "delta": delta, "usage": usage})
    events.append({"type": "message_stop"})
    return events


def _sse(event: Mapping[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
