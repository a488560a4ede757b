"""The contract of a sandbox provider; `sandbox_pipeline.conformance.providers` checks it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

from sandbox_pipeline.checks import Check
from sandbox_pipeline.config import SandboxConfig

Network = Literal["none", "model_api", "full"]

HOME = "/home/user"
"""Home directory in every sandbox; the only place that is writable for sure, with /tmp."""
WORKSPACE = f"{HOME}/workspace"
"""Where the repository is."""
MODEL_HOST = "api.anthropic.com"
STATE_DIR = f"{HOME}/.sandbox_pipeline"
"""Where this package keeps prompt, spooled output and exit codes inside the sandbox."""


@dataclass(frozen=True)
class ProviderHost:
    """What a provider may know of the machine it is used from.

    Attributes:
        home: folder of the deployment, for what a provider keeps on disk.
        environ: for its key, by name.
    """

    home: Path
    environ: Mapping[str, str]


@dataclass(frozen=True)
class SandboxSpec:
    """What to create.

    Attributes:
        lease_id: `[a-z0-9-]{1,63}`, unique; the idempotency key.
        metadata: what the sandbox can be found by afterwards; always has `app`,
            `deployment_id`, `workflow_id`, `fork_num`, `attempt` and `lease_id`.
        ttl_seconds: how long it lives unless extended.
        network: what it may reach.
        base: name of a snapshot to start from, as `SandboxProvider.snapshot` gave it.
        mounts: host path to path inside, read-only, for what an agent's adapter needs; only
            the local provider has them.
        idempotency_key: of this try at creating it; empty: `lease_id`.
        model_host: what network `model_api` lets it reach.
        model_headers: for an `Injecting` provider to put on its requests to `model_host`,
            outside of the sandbox; they hold the model's key.
        on_answer: awaited by a provider whose API has answered, where it has more to do before
            the sandbox takes commands: by then the API has counted the creation.
    """

    lease_id: str
    metadata: Mapping[str, str]
    ttl_seconds: float
    network: Network
    config: SandboxConfig
    base: str | None = None
    mounts: Mapping[str, str] = field(default_factory=dict[str, str])
    idempotency_key: str = ""
    model_host: str = MODEL_HOST
    model_headers: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    on_answer: Callable[[], Awaitable[None]] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True)
class SandboxInfo:
    """One sandbox that exists, as the provider's own list has it.

    Attributes:
        started_at, expires_at: seconds since 1970 by the provider's clock; None where unknown.
    """

    sandbox_id: str
    metadata: Mapping[str, str]
    started_at: float | None = None
    expires_at: float | None = None


@dataclass(frozen=True)
class Command:
    """A command inside a sandbox.

    Attributes:
        argv: run as it is, without a shell.
        cwd: absolute.
        env: added to the sandbox's own environment.
        stdin: given to the command; empty: nothing to read.
        timeout_seconds: afterwards the command and all it started in its session are killed.
        max_output_bytes: of each stream; what comes after is dropped.
        repeatable: may be run again where it is not known whether it ran.
    """

    argv: Sequence[str]
    cwd: str = HOME
    env: Mapping[str, str] = field(default_factory=dict[str, str])
    stdin: bytes = b""
    timeout_seconds: float = 60.0
    max_output_bytes: int = 1_000_000
    repeatable: bool = False


@dataclass(frozen=True)
class CommandResult:
    """What came of a command; failing is a result, not an exception.

    Attributes:
        exit_code: as a shell reports it: 128 + n for signal n, 127 for not found, 124 for
            `timed_out`.
        truncated: output was dropped.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    timed_out: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class Resources:
    """What a sandbox used so far; None where the provider doesn't tell.

    Attributes:
        usd_per_second: estimated price while it lives.
    """

    cpu_seconds: float | None = None
    peak_memory_bytes: int | None = None
    disk_bytes: int | None = None
    usd_per_second: float | None = None


class Sandbox(Protocol):
    """One live sandbox. Every method raises `ProviderError`; `GONE` when it is no more."""

    @property
    def sandbox_id(self) -> str:
        """The provider's name of it."""
        ...

    async def run(self, command: Command) -> CommandResult:
        """Run a short command to its end; processes that it put in the background live on."""
        ...

    async def read(self, path: str, *, offset: int = 0, max_bytes: int = 1_000_000) -> bytes:
        """Up to `max_bytes` of a file from `offset`; empty at or past its end.

        Links are followed inside the sandbox only.

        Raises:
            FileNotFoundError: there is no such file.
        """
        ...

    async def write(self, path: str, data: bytes) -> None:
        """Write a whole file, with its folders, atomically."""
        ...

    async def extend(self, ttl_seconds: float) -> None:
        """Let it live for at least this long from now; never shortens."""
        ...

    async def resources(self) -> Resources:
        """What it used so far."""
        ...


class SandboxProvider(Protocol):
    """Makes, finds and ends sandboxes. Every method raises `ProviderError`."""

    @property
    def name(self) -> str:
        """As in `sandbox.provider`."""
        ...

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """Create one sandbox and return once it takes commands.

        Raises:
            ProviderError: `AMBIGUOUS` unless it is certain that nothing was created; `MISSING`
                where there is no such template or snapshot.
        """
        ...

    async def connect(self, sandbox_id: str) -> Sandbox:
        """An existing sandbox, also one that another process created."""
        ...

    async def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        """All that exist and whose metadata contain these pairs, over all pages."""
        ...

    async def kill(self, sandbox_id: str) -> bool:
        """End it and return once it is gone; False if it was gone already."""
        ...

    async def snapshot(self, sandbox: Sandbox) -> str:
        """Freeze a prepared sandbox as a base for others, ending it; the name for `base`.

        A provider whose sandboxes can't be copied raises `ProviderError(INVALID)`.
        """
        ...

    async def close(self) -> None:
        """Let go of connections; the sandboxes live on."""
        ...


@runtime_checkable
class Injecting(Protocol):
    """A provider that can put `SandboxSpec.model_headers` on a sandbox's requests; optional."""

    async def injects(self, sandbox_id: str, host: str) -> bool:
        """Whether it really does so for this sandbox and host; raises `ProviderError`."""
        ...


@runtime_checkable
class Discarding(Protocol):
    """A provider whose snapshots have to be removed once nobody needs them; optional."""

    async def discard(self, base: str) -> None:
        """Remove a snapshot; nothing where there is none; raises `ProviderError`."""
        ...

    async def snapshots_of(self, sandbox_id: str) -> Sequence[str]:
        """The snapshots that were taken of a sandbox and still exist; it may be gone itself.

        Raises:
            ProviderError: they can't be listed.
        """
        ...


@runtime_checkable
class SelfChecking(Protocol):
    """A provider that can say whether it would work here; optional."""

    async def diagnose(self, config: SandboxConfig) -> Sequence[Check]:
        """What `doctor` shows of it; never raises for what it finds."""
        ...


@dataclass(frozen=True)
class PlanLimits:
    """What an account may do.

    Attributes:
        name: of the plan, for people.
        life_seconds: longest life of a sandbox.
    """

    name: str
    concurrent: int
    creates_per_second: float
    life_seconds: float


@runtime_checkable
class Planned(Protocol):
    """A provider whose smallest plan `doctor` compares a configuration with; optional."""

    @property
    def smallest_plan(self) -> PlanLimits:
        """Which plan an account has, its API doesn't tell."""
        ...
