"""Doubles for every port, and a driver without Dagster; for tests, ours and those of others."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from sandbox_pipeline import orchestrating
from sandbox_pipeline.agents.base import Reporter, Task
from sandbox_pipeline.agents.transcript import TranscriptWriter
from sandbox_pipeline.config import AgentConfig, OrchestrationConfig
from sandbox_pipeline.errors import ProviderError
from sandbox_pipeline.lifecycle import ForkLife
from sandbox_pipeline.records import AgentResult, Event, ForkRef, Outcome
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import (
    WORKSPACE,
    Command,
    CommandResult,
    Discarding,
    Network,
    Resources,
    Sandbox,
    SandboxInfo,
    SandboxProvider,
    SandboxSpec,
)

T = TypeVar("T")


@dataclass
class Fault:
    """One thing that goes wrong.

    Attributes:
        operation: name of the method of provider or sandbox, such as `create` or `read`.
        error: what is raised.
        after: the operation is carried out first, and only its answer is lost.
        times: how often; afterwards all is well.
    """

    operation: str
    error: Exception
    after: bool = False
    times: int = 1


@dataclass
class Ledger:
    """What the provider really did; the truth that tests check against."""

    created: list[str] = field(default_factory=list[str])
    killed: list[str] = field(default_factory=list[str])
    calls: dict[str, int] = field(default_factory=dict[str, int])
    most_alive: int = 0

    @property
    def alive(self) -> list[str]:
        """Sandboxes that were created and not ended."""
        return [item for item in self.created if item not in self.killed]


class FaultyProvider:
    """A real provider on which things go wrong as told; keeps a ledger."""

    def __init__(self, inner: SandboxProvider, faults: Sequence[Fault] = ()) -> None:
        self.inner = inner
        self.faults = list(faults)
        self.ledger = Ledger()

    @property
    def name(self) -> str:
        """See `SandboxProvider.name`."""
        return self.inner.name

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """See `SandboxProvider.create`."""

        async def work() -> Sandbox:
            sandbox = await self.inner.create(spec)
            if sandbox.sandbox_id not in self.ledger.created:
                self.ledger.created.append(sandbox.sandbox_id)
            self.ledger.most_alive = max(self.ledger.most_alive, len(self.ledger.alive))
            return FaultySandbox(sandbox, self)

        return await self.call("create", work)

    async def connect(self, sandbox_id: str) -> Sandbox:
        """See `SandboxProvider.connect`."""

        async def work() -> Sandbox:
            return FaultySandbox(await self.inner.connect(sandbox_id), self)

        return await self.call("connect", work)

    async def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        """See `SandboxProvider.list`."""
        return await self.call("list", lambda: self.inner.list(metadata))

    async def kill(self, sandbox_id: str) -> bool:
        """See `SandboxProvider.kill`."""

        async def work() -> bool:
            killed = await self.inner.kill(sandbox_id)
            self.ledger.killed.append(sandbox_id)
            return killed

        return await self.call("kill", work)

    async def snapshot(self, sandbox: Sandbox) -> str:
        """See `SandboxProvider.snapshot`."""
        inner = sandbox.inner if isinstance(sandbox, FaultySandbox) else sandbox
        name = await self.call("snapshot", lambda: self.inner.snapshot(inner))
        self.ledger.killed.append(sandbox.sandbox_id)
        return name

    async def discard(self, base: str) -> None:
        """See `Discarding.discard`."""
        if isinstance(self.inner, Discarding):
            inner = self.inner
            await self.call("discard", lambda: inner.discard(base))

    async def snapshots_of(self, sandbox_id: str) -> Sequence[str]:
        """See `Discarding.snapshots_of`."""
        if not isinstance(self.inner, Discarding):
            return []
        inner = self.inner
        return await self.call("snapshots_of", lambda: inner.snapshots_of(sandbox_id))

    async def close(self) -> None:
        """See `SandboxProvider.close`."""
        await self.inner.close()

    async def call(self, operation: str, work: Callable[[], Awaitable[T]]) -> T:
        """Do the work, unless a fault says otherwise."""
        self.ledger.calls[operation] = self.ledger.calls.get(operation, 0) + 1
        for fault in self.faults:
            if fault.operation == operation and fault.times > 0:
                fault.times -= 1
                if fault.after:
                    await work()
                raise fault.error
        return await work()


class FaultySandbox:
    """A real sandbox under a `FaultyProvider`."""

    def __init__(self, inner: Sandbox, provider: FaultyProvider) -> None:
        self.inner = inner
        self._provider = provider

    @property
    def sandbox_id(self) -> str:
        """See `Sandbox.sandbox_id`."""
        return self.inner.sandbox_id

    async def run(self, command: Command) -> CommandResult:
        """See `Sandbox.run`."""
        return await self._provider.call("run", lambda: self.inner.run(command))

    async def read(self, path: str, *, offset: int = 0, max_bytes: int = 1_000_000) -> bytes:
        """See `Sandbox.read`."""
        return await self._provider.call(
            "read", lambda: self.inner.read(path, offset=offset, max_bytes=max_bytes)
        )

    async def write(self, path: str, data: bytes) -> None:
        """See `Sandbox.write`."""
        await self._provider.call("write", lambda: self.inner.write(path, data))

    async def extend(self, ttl_seconds: float) -> None:
        """See `Sandbox.extend`."""
        await self._provider.call("extend", lambda: self.inner.extend(ttl_seconds))

    async def resources(self) -> Resources:
        """See `Sandbox.resources`."""
        return await self._provider.call("resources", self.inner.resources)


class FakeAgent:
    """Does what a function says, in place of a model.

    Args:
        work: given sandbox and task; by default it adds a file and succeeds.
    """

    kind = "fake"
    network: Network = "none"

    def __init__(
        self, work: Callable[[Sandbox, Task], Awaitable[AgentResult]] | None = None
    ) -> None:
        self._work = work or _add_a_file
        self.runs: list[tuple[int, int]] = []
        """Fork and attempt of each run, in order."""

    def validate(self, config: AgentConfig, environ: Mapping[str, str], *, provider: str) -> None:
        """See `Agent.validate`."""

    def mounts(self, config: AgentConfig, environ: Mapping[str, str]) -> Mapping[str, str]:
        """See `Agent.mounts`."""
        return {}

    async def run(self, sandbox: Sandbox, task: Task, reporter: Reporter) -> AgentResult:
        """See `Agent.run`."""
        self.runs.append((task.fork_num, task.attempt))
        await reporter.progress("working")
        with TranscriptWriter(task.artifacts / "transcript.jsonl", task.redactor) as transcript:
            transcript.add("prompt", task.prompt)
            result = await self._work(sandbox, task)
            transcript.add("result", result.message)
        message = task.redactor.text(result.message)
        leak = result.secret_leak or transcript.leaked
        return result.model_copy(update={"message": message, "secret_leak": leak})


async def _add_a_file(sandbox: Sandbox, task: Task) -> AgentResult:
    text = f"fork {task.fork_num}\n"
    await sandbox.write(f"{WORKSPACE}/fork_{task.fork_num}.txt", text.encode())
    return AgentResult(outcome=Outcome.SUCCESS, exit_code=0, message="added a file")


async def drive(
    runtime: Runtime,
    config: OrchestrationConfig,
    workflow_id: str,
    *,
    run_id: str = "run-1",
    events: list[Event] | None = None,
) -> orchestrating.Completed:
    """Run a whole orchestration in this event loop, as Dagster would run its ops."""
    announce = (events if events is not None else list[Event]()).append
    refs = await orchestrating.begin(runtime, config, workflow_id, run_id, announce=announce)

    async def one(ref: ForkRef) -> None:
        life = ForkLife(runtime, ref, run_id, announce)
        await life.create_sandbox()
        await life.health_check()
        await life.run_agent()
        await life.record_metrics()
        await life.cleanup_sandbox()
        await life.verify_patch()

    await asyncio.gather(*(one(ref) for ref in refs))
    return await orchestrating.complete(runtime, workflow_id, run_id, announce)


def transient(kind: str = "unavailable", **fields: float) -> ProviderError:
    """A provider error by the name of its kind."""
    from sandbox_pipeline.errors import ErrorKind

    return ProviderError(ErrorKind(kind), f"made to fail: {kind}", **fields)
