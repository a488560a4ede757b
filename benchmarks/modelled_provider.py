"""A provider's account as a model: limits of a plan, latency, failures. No sandbox is real."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sandbox_pipeline.errors import ErrorKind, ProviderError
from sandbox_pipeline.sandboxes.base import (
    Command,
    CommandResult,
    Resources,
    Sandbox,
    SandboxInfo,
    SandboxSpec,
)


@dataclass(frozen=True)
class Plan:
    """What the account may do, and how its API behaves.

    Attributes:
        concurrent: most sandboxes alive, those being created included.
        creates_per_second: most requests to create in any second, by the provider's clock.
        latency_seconds: median of the time until a creation is answered; log-normal.
        latency_sigma: its spread; 0.6 puts the 99th percentile at four times the median.
        failure_rate: of creations; half of them create a sandbox whose answer is lost.
    """

    concurrent: int
    creates_per_second: int
    latency_seconds: float = 0.6
    latency_sigma: float = 0.6
    failure_rate: float = 0.005


class ModelledSandbox:
    """A name only; nothing is run in it."""

    def __init__(self, sandbox_id: str) -> None:
        self.sandbox_id = sandbox_id

    async def run(self, command: Command) -> CommandResult:
        """Succeeds at once."""
        return CommandResult(0, b"", b"")

    async def read(self, path: str, *, offset: int = 0, max_bytes: int = 1_000_000) -> bytes:
        """Is empty."""
        return b""

    async def write(self, path: str, data: bytes) -> None:
        """Keeps nothing."""

    async def extend(self, ttl_seconds: float) -> None:
        """Lives on."""

    async def resources(self) -> Resources:
        """Unknown."""
        return Resources()


class ModelledProvider:
    """See `SandboxProvider`; counts what the account's owner would see.

    Args:
        plan: its limits.
        dice: where its latencies and failures come from.
    """

    name = "e2b"

    def __init__(self, plan: Plan, dice: random.Random) -> None:
        self._plan = plan
        self._dice = dice
        self._alive: dict[str, Mapping[str, str]] = {}
        self._being_made = 0
        self._arrivals: deque[float] = deque()
        self._changed_at = 0.0
        self.refused: Counter[str] = Counter()
        self.requests = 0
        self.most_alive = 0
        self.most_alive_of_one = 0
        self._alive_of: Counter[str] = Counter()
        self.most_in_a_second = 0
        self.alive_seconds = 0.0

    @property
    def alive(self) -> int:
        """Sandboxes that exist."""
        return len(self._alive)

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """Answers after a while; the request is counted on its way there."""
        latency = self._plan.latency_seconds * self._dice.lognormvariate(
            0, self._plan.latency_sigma
        )
        arrival = latency * self._dice.uniform(0.05, 0.5)
        await asyncio.sleep(arrival)
        self._count_arrival()
        if self.alive + self._being_made >= self._plan.concurrent:
            self.refused["concurrent"] += 1
            msg = "too many sandboxes (429)"
            raise ProviderError(ErrorKind.RATE_LIMITED, msg)
        self._being_made += 1
        try:
            await asyncio.sleep(latency - arrival)
        finally:
            self._being_made -= 1
        fate = self._dice.random() / self._plan.failure_rate if self._plan.failure_rate else 1.0
        if fate < 0.5:
            msg = "503"
            raise ProviderError(ErrorKind.UNAVAILABLE, msg)
        self._clock()
        self._alive[f"m-{spec.idempotency_key}"] = dict(spec.metadata)
        self.most_alive = max(self.most_alive, self.alive)
        workflow = spec.metadata["workflow_id"]
        self._alive_of[workflow] += 1
        self.most_alive_of_one = max(self.most_alive_of_one, self._alive_of[workflow])
        if fate < 1.0:
            msg = "the connection was reset"
            raise ProviderError(ErrorKind.AMBIGUOUS, msg)
        return ModelledSandbox(f"m-{spec.idempotency_key}")

    async def connect(self, sandbox_id: str) -> Sandbox:
        """See `SandboxProvider`."""
        if sandbox_id not in self._alive:
            raise ProviderError(ErrorKind.GONE, sandbox_id)
        return ModelledSandbox(sandbox_id)

    async def list(self, metadata: Mapping[str, str]) -> Sequence[SandboxInfo]:
        """See `SandboxProvider`."""
        wanted = metadata.items()
        return [
            SandboxInfo(name, found)
            for name, found in self._alive.items()
            if wanted <= found.items()
        ]

    async def kill(self, sandbox_id: str) -> bool:
        """See `SandboxProvider`."""
        self._clock()
        ended = self._alive.pop(sandbox_id, None)
        if ended is not None:
            self._alive_of[ended["workflow_id"]] -= 1
        return ended is not None

    async def snapshot(self, sandbox: Sandbox) -> str:
        """Has none."""
        raise ProviderError(ErrorKind.INVALID, "no snapshots")

    async def close(self) -> None:
        """Nothing to let go of."""

    def _count_arrival(self) -> None:
        now = asyncio.get_running_loop().time()
        self.requests += 1
        while self._arrivals and self._arrivals[0] <= now - 1.0:
            self._arrivals.popleft()
        self._arrivals.append(now)
        self.most_in_a_second = max(self.most_in_a_second, len(self._arrivals))
        if len(self._arrivals) > self._plan.creates_per_second:
            self._arrivals.pop()
            self.refused["rate"] += 1
            msg = "too many requests (429)"
            raise ProviderError(ErrorKind.RATE_LIMITED, msg, retry_after_seconds=1.0)

    def _clock(self) -> None:
        """Add up the time that sandboxes were alive until now."""
        now = asyncio.get_running_loop().time()
        self.alive_seconds += self.alive * (now - self._changed_at)
        self._changed_at = now
