"""Scripted faults: which request goes wrong, and how."""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tests.servers.e2b_server.ledger import Ledger

DEFAULT_HEADERS = {"content-type": "application/json"}


@dataclass(frozen=True)
class Fault:
    """One rule.

    Attributes:
        method: HTTP method, or `*`.
        path: regular expression that the whole path matches.
        first, times: the rule applies to the matching requests number `first` (from 1) to
            `first + times - 1`; `times=0`: to all from `first` on.
        when: `before` the server does the work (and instead of it, where there is an answer or a
            drop), `after` it, or `during` it: after `after_bytes` of the answer's body.
        delay_seconds: pause at that point.
        drop: cut the connection without (further) answer.
        status: answer with this, `headers` and `body`; None: with what the server says.
    """

    path: str = ".*"
    method: str = "*"
    first: int = 1
    times: int = 1
    when: Literal["before", "after", "during"] = "before"
    delay_seconds: float = 0.0
    drop: bool = False
    after_bytes: int = 0
    status: int | None = None
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=lambda: dict(DEFAULT_HEADERS))


def api_error(status: int, message: str = "scripted", **rule: Any) -> Fault:
    """A fault that answers as E2B's own API does."""
    body = f'{{"code":{status},"message":"{message}"}}'
    return Fault(status=status, body=body, **rule)


class FaultScript:
    """The rules in force and how often each has matched."""

    def __init__(self) -> None:
        self._rules: list[tuple[Fault, list[int]]] = []
        self._lock = threading.Lock()

    def add(self, *faults: Fault) -> None:
        """Put rules in force; the first one that applies wins."""
        with self._lock:
            self._rules += [(fault, [0]) for fault in faults]

    def clear(self) -> None:
        """No more faults."""
        with self._lock:
            self._rules.clear()

    def match(self, method: str, path: str) -> Fault | None:
        """The fault for this request; counts it for every rule that matches."""
        chosen: Fault | None = None
        with self._lock:
            for fault, seen in self._rules:
                if fault.method not in ("*", method) or not re.fullmatch(fault.path, path):
                    continue
                seen[0] += 1
                number = seen[0] - fault.first
                if chosen is None and number >= 0 and (fault.times == 0 or number < fault.times):
                    chosen = fault
        return chosen


class FaultMiddleware:
    """Outermost ASGI layer: writes requests to the ledger and carries out the script."""

    def __init__(self, app: ASGIApp, script: FaultScript, ledger: Ledger) -> None:
        self._app = app
        self._script = script
        self._ledger = ledger

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith("/admin/"):
            await self._app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"]
        self._ledger.add("request", request=f"{method} {path}")
        fault = self._script.match(method, path)
        if fault is None:
            await self._app(scope, receive, send)
        elif fault.when == "before":
            await self._before(fault, scope, receive, send)
        elif fault.when == "after":
            await self._after(fault, scope, receive, send)
        else:
            await self._app(scope, receive, _Cutter(fault, send))

    async def _before(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        await asyncio.sleep(fault.delay_seconds)
        if fault.drop:
            _drop(send)
        elif fault.status is not None:
            await _answer(fault, send)
        else:
            await self._app(scope, receive, send)

    async def _after(self, fault: Fault, scope: Scope, receive: Receive, send: Send) -> None:
        kept: list[MutableMapping[str, Any]] = []

        async def keep(message: Message) -> None:
            kept.append(message)

        # The client may go away meanwhile; what it asked for is done all the same.
        await self._app(scope, receive, keep)
        await asyncio.sleep(fault.delay_seconds)
        if fault.drop:
            _drop(send)
        elif fault.status is not None:
            await _answer(fault, send)
        else:
            for message in kept:
                await send(message)


class _Cutter:
    def __init__(self, fault: Fault, send: Send) -> None:
        self._fault = fault
        self._send = send
        self._sent = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.body":
            if self._sent >= self._fault.after_bytes:
                await asyncio.sleep(self._fault.delay_seconds)
                _drop(self._send)
            self._sent += len(message.get("body", b""))
        await self._send(message)


async def _answer(fault: Fault, send: Send) -> None:
    headers = [(name.lower().encode(), value.encode()) for name, value in fault.headers.items()]
    await send({"type": "http.response.start", "status": fault.status or 500, "headers": headers})
    await send({"type": "http.response.body", "body": fault.body.encode()})


def _drop(send: Send) -> None:
    # ASGI has no way to cut a connection; uvicorn's `send` is a method of the object that
    # holds the transport.
    cycle: Any = getattr(send, "__self__")  # noqa: B009 - the attribute is not in the type
    cycle.disconnected = True
    cycle.transport.abort()
