"""Creating with retries: a key for each try, doubt resolved at the end, injection given up."""

from __future__ import annotations

from collections.abc import Callable

from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.records import Fork, Outcome, fork_key
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import Sandbox, SandboxSpec
from sandbox_pipeline.testing import Fault, FaultyProvider, drive, transient


class _KeyedProvider(FaultyProvider):
    """Remembers with which keys it was asked."""

    def __init__(self, inner: FaultyProvider) -> None:
        super().__init__(inner.inner, inner.faults)
        self.ledger = inner.ledger
        self.keys: list[str] = []

    async def create(self, spec: SandboxSpec) -> Sandbox:
        self.keys.append(spec.idempotency_key)
        return await super().create(spec)


async def test_remembered_failure_is_not_met_again(
    runtime: Runtime, provider: FaultyProvider, config: Callable[..., OrchestrationConfig]
) -> None:
    """A server that keeps answers by key would repeat the first failure for ever."""
    keyed = _KeyedProvider(provider)
    runtime._providers["local"] = keyed
    keyed.faults = [Fault("create", transient("unavailable"), times=2)]
    done = await drive(runtime, config(num_forks=1), "keys")
    assert done.summary["succeeded"] == 1
    assert len(set(keyed.keys)) == 3
    assert [key.rpartition("-")[2] for key in keyed.keys] == ["1", "2", "3"]
    assert len({key.rpartition("-")[0] for key in keyed.keys}) == 1, "one lease"


async def test_second_sandbox_of_a_doubtful_creation_is_ended_too(
    runtime: Runtime, provider: FaultyProvider, config: Callable[..., OrchestrationConfig]
) -> None:
    provider.faults = [Fault("create", transient("ambiguous"), after=True)]
    done = await drive(runtime, config(num_forks=1), "doubt")
    fork = await runtime.store.need(Fork, fork_key("doubt", 0))
    assert (fork.outcome, done.summary["succeeded"]) == (Outcome.SUCCESS, 1)
    assert provider.ledger.calls["list"] >= 2, "asked when created and once more when ended"
    assert provider.ledger.alive == []


async def test_sandbox_without_room_fails_its_fork_only(
    runtime: Runtime, provider: FaultyProvider, config: Callable[..., OrchestrationConfig]
) -> None:
    provider.faults = [Fault("write", transient("exhausted"))]
    done = await drive(runtime, config(num_forks=3), "full")
    assert (done.summary["succeeded"], done.summary["failed"], done.error) == (2, 1, None)
    [failed] = [row for row in done.rows if row["outcome"] == "failed"]
    assert failed["failure_class"] == "sandbox_full"
