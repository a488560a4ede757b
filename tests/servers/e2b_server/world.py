"""The state of the fake cloud: sandboxes, templates, snapshots, and what ends them."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from tests.servers.e2b_server.egress import Egress
from tests.servers.e2b_server.ledger import EntryKind, Ledger
from tests.servers.e2b_server.machine import Machine


class ApiError(Exception):
    """A refusal, as the control plane words it."""

    def __init__(
        self, status: int, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.headers = dict(headers or {})


@dataclass(frozen=True)
class Limits:
    """What an account of the fake cloud may do.

    Attributes:
        creates_per_second: creations in any second; more answer 429 with Retry-After.
        concurrent: sandboxes alive at once; more answer 429.
        max_ttl_seconds: longest life.
        page_size: most sandboxes on a page of the list.
        idempotency: whether the create call honours Idempotency-Key.
        rules: what becomes of network rules: kept, refused with 400, or silently left out.
    """

    creates_per_second: int | None = None
    concurrent: int | None = None
    max_ttl_seconds: float = 86_400
    page_size: int = 100
    idempotency: bool = True
    rules: Literal["kept", "refused", "ignored"] = "kept"


@dataclass
class CloudSandbox:
    """One sandbox.

    Attributes:
        machine: None for a row without processes, which lists are tested with.
    """

    sandbox_id: str
    template: str
    metadata: dict[str, str]
    network: dict[str, Any]
    internet: bool | None
    token: str
    machine: Machine | None
    started: float
    ends: float
    state: str = "running"
    timer: asyncio.TimerHandle | None = None
    ready: asyncio.Event = field(default_factory=asyncio.Event)
    baseline: list[tuple[float, float, int]] = field(default_factory=list[tuple[float, float, int]])


@dataclass(frozen=True)
class CreateRequest:
    """What a create call asks for."""

    template: str
    ttl_seconds: float
    metadata: dict[str, str]
    network: dict[str, Any]
    internet: bool | None
    idempotency_key: str | None


class World:
    """All sandboxes of one server; used from its event loop only."""

    def __init__(
        self,
        root: Path,
        ledger: Ledger,
        *,
        limits: Limits,
        templates: frozenset[str],
        programs: Mapping[str, Path],
        internet: Mapping[str, str],
    ) -> None:
        self._programs = programs
        self._internet = internet
        self.sandboxes: dict[str, CloudSandbox] = {}
        self.limits = limits
        self.ledger = ledger
        self.templates = set(templates)
        self.snapshots: dict[str, str] = {}
        """Name to the sandbox that it was taken of."""
        self._root = root
        self.request_bodies: list[dict[str, Any]] = []
        self._keys: dict[str, str] = {}
        self._creates: list[float] = []
        self._tasks: set[asyncio.Task[bool]] = set()

    async def create(self, request: CreateRequest) -> CloudSandbox:
        """Boot a sandbox, or find the one that was created with the same key."""
        known = self.sandboxes.get(self._keys.get(request.idempotency_key or "", ""))
        if known is not None and self.limits.idempotency:
            await known.ready.wait()
            return known
        self._admit(request)
        sandbox_id = f"i{secrets.token_hex(9)}"
        machine = self._machine(sandbox_id, request)
        sandbox = self._register(request, sandbox_id, machine)
        try:
            if (snapshot := self._root / "snapshots" / request.template).is_dir():
                await asyncio.to_thread(shutil.copytree, snapshot, machine.home, symlinks=True)
            await machine.start()
        finally:
            sandbox.ready.set()
        return sandbox

    def _machine(self, sandbox_id: str, request: CreateRequest) -> Machine:
        root = self._root / sandbox_id
        if request.internet is False:
            return Machine(root, network=False, programs=self._programs)
        egress = None
        if self._internet:

            def note(name: str, headers: Mapping[str, str]) -> None:
                self.ledger.add("egress", sandbox_id=sandbox_id, request=name, headers=headers)

            root.mkdir(parents=True)
            egress = Egress(root / "egress", request.network, self._internet, note)
        return Machine(
            root,
            # The relay needs its port, which sandboxes with this machine's network would share.
            network=egress is None and not _limited(request),
            programs=self._programs,
            egress=egress,
            names=list(self._internet),
        )

    def add_row(self, metadata: Mapping[str, str], *, ttl_seconds: float = 3600) -> str:
        """A sandbox without processes; its id."""
        request = CreateRequest("base", ttl_seconds, dict(metadata), {}, None, None)
        return self._register(request, f"i{secrets.token_hex(9)}", None).sandbox_id

    def _admit(self, request: CreateRequest) -> None:
        if "rules" in request.network and self.limits.rules != "kept":
            if self.limits.rules == "refused":
                raise ApiError(400, "network: unknown field 'rules'")
            del request.network["rules"]
        if request.template not in self.templates:
            raise ApiError(404, f"template '{request.template}' not found")
        self._check_ttl(request.ttl_seconds)
        now = time.monotonic()
        self._creates = [moment for moment in self._creates if now - moment < 1.0]
        rate, most = self.limits.creates_per_second, self.limits.concurrent
        if rate is not None and len(self._creates) >= rate:
            raise ApiError(429, "too many creations", headers={"retry-after": "1"})
        if most is not None and len(self.sandboxes) >= most:
            raise ApiError(429, f"you have reached the maximum of {most} concurrent sandboxes")
        self._creates.append(now)

    def _check_ttl(self, ttl_seconds: float) -> None:
        if ttl_seconds > self.limits.max_ttl_seconds:
            hours = self.limits.max_ttl_seconds / 3600
            raise ApiError(400, f"Timeout cannot be greater than {hours:g} hours")

    def _register(
        self, request: CreateRequest, sandbox_id: str, machine: Machine | None
    ) -> CloudSandbox:
        now = time.time()
        sandbox = CloudSandbox(
            sandbox_id=sandbox_id,
            template=request.template,
            metadata=request.metadata,
            network=request.network,
            internet=request.internet,
            token=secrets.token_hex(16),
            machine=machine,
            started=now,
            ends=now + request.ttl_seconds,
        )
        self.sandboxes[sandbox_id] = sandbox
        if request.idempotency_key is not None:
            self._keys[request.idempotency_key] = sandbox_id
        self.ledger.add(
            "created",
            sandbox_id=sandbox_id,
            metadata=request.metadata,
            idempotency_key=request.idempotency_key,
            network=_network_name(request),
            ttl_seconds=request.ttl_seconds,
        )
        self._arm(sandbox, request.ttl_seconds)
        return sandbox

    def _arm(self, sandbox: CloudSandbox, seconds: float) -> None:
        if sandbox.timer is not None:
            sandbox.timer.cancel()
        sandbox.ends = time.time() + seconds
        sandbox.timer = asyncio.get_running_loop().call_later(seconds, self._expire, sandbox)

    def _expire(self, sandbox: CloudSandbox) -> None:
        task = asyncio.get_running_loop().create_task(self.end(sandbox.sandbox_id, "expired"))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def find(self, sandbox_id: str) -> CloudSandbox:
        """One that exists, or 404."""
        sandbox = self.sandboxes.get(sandbox_id)
        if sandbox is None:
            raise ApiError(404, f"sandbox {sandbox_id} not found")
        return sandbox

    def set_ttl(self, sandbox: CloudSandbox, ttl_seconds: float, *, only_longer: bool) -> None:
        """Let it end that many seconds from now."""
        self._check_ttl(ttl_seconds)
        if only_longer and time.time() + ttl_seconds <= sandbox.ends:
            return
        self.ledger.add("extended", sandbox_id=sandbox.sandbox_id, ttl_seconds=ttl_seconds)
        self._arm(sandbox, ttl_seconds)

    async def end(self, sandbox_id: str, how: EntryKind) -> bool:
        """End one with all of its processes; False where there is none."""
        sandbox = self.sandboxes.pop(sandbox_id, None)
        if sandbox is None:
            return False
        if sandbox.timer is not None:
            sandbox.timer.cancel()
        if sandbox.machine is not None:
            await sandbox.machine.stop()
        self.ledger.add(how, sandbox_id=sandbox_id, metadata=sandbox.metadata)
        return True

    async def snapshot(self, sandbox: CloudSandbox) -> str:
        """Copy its home folder under a name that can be created from."""
        if sandbox.machine is None:
            raise ApiError(400, "nothing to take a snapshot of")
        name = f"snap-{secrets.token_hex(8)}"
        await asyncio.to_thread(
            shutil.copytree, sandbox.machine.home, self._root / "snapshots" / name, symlinks=True
        )
        self.templates.add(name)
        self.snapshots[name] = sandbox.sandbox_id
        self.ledger.add(
            "snapshot", sandbox_id=sandbox.sandbox_id, metadata=sandbox.metadata, request=name
        )
        return name

    async def delete_template(self, name: str) -> None:
        """Forget a snapshot, or 404."""
        folder = self._root / "snapshots" / name
        if name not in self.templates or not folder.is_dir():
            raise ApiError(404, f"template '{name}' not found")
        self.templates.discard(name)
        self.snapshots.pop(name, None)
        await asyncio.to_thread(shutil.rmtree, folder, True)
        self.ledger.add("snapshot-deleted", request=name)

    async def shut_down(self) -> None:
        """End everything."""
        for sandbox_id in list(self.sandboxes):
            with contextlib.suppress(Exception):
                await self.end(sandbox_id, "killed")


def _network_name(request: CreateRequest) -> str:
    if request.internet is False:
        return "none"
    allowed = ",".join(request.network.get("allowOut") or [])
    denied = ",".join(request.network.get("denyOut") or [])
    return f"allow {allowed} deny {denied}" if allowed or denied else "full"


def _limited(request: CreateRequest) -> bool:
    return bool(request.network.get("allowOut") or request.network.get("denyOut"))
