"""One fork's life, with a real local sandbox on which things go wrong."""

from __future__ import annotations

import asyncio
import base64
import urllib.parse
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_pipeline.agents.base import Reporter, Task
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import (
    ConfigError,
    ErrorKind,
    FailureClass,
    OwnershipError,
    ProviderError,
)
from sandbox_pipeline.lifecycle import ForkLife
from sandbox_pipeline.orchestrating import begin, complete, settle_cancelled
from sandbox_pipeline.records import (
    AgentResult,
    Event,
    Fork,
    ForkRef,
    Orchestration,
    Outcome,
    fork_key,
    orchestration_key,
)
from sandbox_pipeline.runtime import Runtime, silent
from sandbox_pipeline.sandboxes.base import Sandbox
from sandbox_pipeline.testing import FakeAgent, Fault, FaultyProvider, drive, transient
from tests.postgres import Postgres

Make = Callable[..., OrchestrationConfig]


@pytest.fixture(params=["sqlite", "postgresql"])
def db_url(request: pytest.FixtureRequest) -> str | None:
    """The whole of a fork's life on both databases."""
    if request.param == "sqlite":
        return None
    server: Postgres = request.getfixturevalue("postgres")
    return server.new_database()


def outcomes(rows: list[dict[str, object]]) -> list[tuple[object, object]]:
    return [(row["outcome"], row["failure_class"]) for row in rows]


async def test_all_forks_succeed_with_their_own_patches(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    events: list[Event] = []
    done = await drive(runtime, config(num_forks=3), "w", events=events)
    assert outcomes(done.rows) == [("success", None)] * 3
    assert done.error is None
    for row in done.rows:
        assert row["files_changed"] == 1
        assert row["insertions"] == 1
        assert row["sandbox_seconds"] is not None
        text = Path(str(row["patch_path"])).read_text(encoding="utf-8")
        assert f"+fork {row['fork_num']}" in text
    assert provider.ledger.alive == []
    names = [event.name for event in events if event.fork_num == 0]
    assert names == [
        "fork-started",
        "sandbox-created",
        "health-check-passed",
        "agent-progress",
        "agent-completed",
        "metrics-recorded",
        "sandbox-cleaned",
    ]
    assert events[0].name == "orchestration-requested"
    assert events[-1].name == "orchestration-completed"
    stored = [event.name for event in await runtime.store.events("w")]
    assert sorted(stored) == sorted(event.name for event in events)


@pytest.mark.parametrize(
    ("kind", "creates", "failure_class"),
    [
        (ErrorKind.AUTH, 1, "auth"),
        (ErrorKind.INVALID, 1, "config"),
        (ErrorKind.MISSING, 1, "config"),
        (ErrorKind.RATE_LIMITED, 3, "rate_limited"),
        (ErrorKind.UNAVAILABLE, 3, "creation_failed"),
        (ErrorKind.AMBIGUOUS, 3, "creation_failed"),
    ],
)
async def test_creation_that_always_fails_is_tried_as_the_table_says(
    runtime: Runtime,
    config: Make,
    provider: FaultyProvider,
    kind: ErrorKind,
    creates: int,
    failure_class: str,
) -> None:
    provider.faults = [Fault("create", ProviderError(kind, "no"), times=100)]
    done = await drive(runtime, config(num_forks=1), "w")
    assert outcomes(done.rows) == [("failed", failure_class)]
    assert provider.ledger.calls["create"] == creates
    assert done.rows[0]["create_attempts"] == creates
    assert provider.ledger.alive == []


class Chatty(FakeAgent):
    """Tells how it is doing far too often."""

    async def run(self, sandbox: Sandbox, task: Task, reporter: Reporter) -> AgentResult:
        for turn in range(50):
            line = f"turn {turn}, Edit, 1.0k tokens " + "x" * 500
            await reporter.progress(line, cost_usd=0.01 * (turn + 1))
        return AgentResult(outcome=Outcome.SUCCESS)


async def test_progress_is_one_bounded_line_in_the_events_and_each_cost_in_the_record(
    runtime: Runtime, config: Make
) -> None:
    runtime._agents["fake"] = Chatty()
    events: list[Event] = []
    await drive(runtime, config(num_forks=1), "w", events=events)
    [told] = [event for event in events if event.name == "agent-progress"]
    assert told.payload["progress"].startswith("turn 0, Edit, 1.0k tokens xxx")
    assert len(told.payload["progress"]) <= 120
    assert told.payload["cost_usd"] == 0.01
    fork = await runtime.store.need(Fork, fork_key("w", 0))
    assert fork.cost_so_far_usd == pytest.approx(0.5)


async def test_a_fatal_failure_stops_further_creations_and_fails_the_run(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    provider.faults = [Fault("create", ProviderError(ErrorKind.AUTH, "bad E2B_API_KEY"), times=9)]
    done = await drive(runtime, config(num_forks=5, max_concurrent=1), "w")
    assert provider.ledger.calls["create"] == 1
    assert outcomes(done.rows) == [("failed", "auth")] * 5
    assert done.error == "auth: bad E2B_API_KEY"


async def test_a_created_sandbox_whose_answer_was_lost_is_adopted(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    provider.faults = [Fault("create", transient("ambiguous"), after=True)]
    done = await drive(runtime, config(num_forks=1), "w")
    assert outcomes(done.rows) == [("success", None)]
    assert len(provider.ledger.created) == 1
    assert provider.ledger.calls["create"] == 1
    assert provider.ledger.alive == []


async def test_a_longer_retry_after_than_the_cap_fails_as_rate_limited(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    provider.faults = [Fault("create", transient("rate_limited", retry_after_seconds=120), times=9)]
    done = await drive(runtime, config(num_forks=1), "w")
    assert outcomes(done.rows) == [("failed", "rate_limited")]
    assert provider.ledger.calls["create"] == 1


async def test_health_that_flaps_passes(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    flapping = "n=$(cat /tmp/n 2>/dev/null || echo 0); echo $((n+1)) > /tmp/n; test $n -ge 2"
    check = {"command": flapping, "attempts": 3, "interval_seconds": 0.01}
    done = await drive(runtime, config(num_forks=1, health_check=check), "w")
    assert outcomes(done.rows) == [("success", None)]
    assert len(provider.ledger.created) == 1


async def test_health_that_never_comes_replaces_the_sandbox_then_gives_up(
    runtime: Runtime, config: Make, provider: FaultyProvider, agent: FakeAgent
) -> None:
    check = {"command": "echo sick >&2; exit 3", "attempts": 2, "interval_seconds": 0.01}
    done = await drive(runtime, config(num_forks=1, health_check=check), "w")
    assert outcomes(done.rows) == [("failed", "unhealthy")]
    assert "exited with 3: sick" in str(done.rows[0]["message"])
    assert len(provider.ledger.created) == 3
    assert provider.ledger.alive == []
    assert agent.runs == [], "the agent must not run in an unhealthy sandbox"


async def test_a_sandbox_lost_under_the_agent_fails_that_fork_only(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    async def lose(sandbox: Sandbox, task: Task) -> AgentResult:
        if task.fork_num == 0:
            await provider.inner.kill(sandbox.sandbox_id)
            await sandbox.read("/tmp/x")
        return AgentResult(outcome=Outcome.SUCCESS)

    runtime._agents["fake"] = FakeAgent(lose)
    done = await drive(runtime, config(), "w")
    assert outcomes(done.rows) == [("failed", "sandbox_lost"), ("success", None)]


async def test_an_unexpected_exception_is_one_forks_failure(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    async def bug(sandbox: Sandbox, task: Task) -> AgentResult:
        if task.fork_num == 0:
            msg = "a bug"
            raise ZeroDivisionError(msg)
        return AgentResult(outcome=Outcome.SUCCESS)

    runtime._agents["fake"] = FakeAgent(bug)
    done = await drive(runtime, config(), "w")
    assert outcomes(done.rows) == [("failed", "internal"), ("success", None)]
    assert "ZeroDivisionError: a bug" in str(done.rows[0]["message"])
    assert provider.ledger.alive == []


async def test_reads_that_fail_for_a_while_do_not_fail_the_fork(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    provider.faults = [Fault("read", transient("ambiguous"), times=5)]
    done = await drive(runtime, config(num_forks=1), "w")
    assert outcomes(done.rows) == [("success", None)]


async def test_a_kill_that_fails_leaves_the_outcome_and_the_lease_to_the_reaper(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    provider.faults = [Fault("kill", transient("ambiguous"), times=6)]
    done = await drive(runtime, config(num_forks=1), "w")
    assert outcomes(done.rows) == [("success", None)]
    stored = await runtime.store.need(Orchestration, orchestration_key("w"))
    assert not stored.complete, "not complete while a sandbox may be alive"
    provider.faults = []
    from sandbox_pipeline.reaper import reap

    reaped = await reap(runtime)
    assert [item.workflow_id for item in reaped] == ["w"]
    assert provider.ledger.alive == []
    assert (await runtime.store.need(Orchestration, orchestration_key("w"))).complete
    assert await reap(runtime) == []


async def test_never_more_alive_than_max_concurrent(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    done = await drive(runtime, config(num_forks=8, max_concurrent=2), "w")
    assert done.summary["succeeded"] == 8
    assert provider.ledger.most_alive == 2
    assert max(row["queue_seconds"] for row in done.rows) > 0


async def test_a_second_run_of_the_same_name_is_refused_naming_the_first(
    runtime: Runtime, config: Make
) -> None:
    await begin(runtime, config(), "w", "run-1")
    with pytest.raises(OwnershipError, match="run-1"):
        await begin(runtime, config(), "w", "run-2")


async def test_a_finished_orchestration_is_not_done_again(
    runtime: Runtime, config: Make, agent: FakeAgent
) -> None:
    await drive(runtime, config(), "w")
    again = await begin(runtime, config(), "w", "run-2", previous_ended=True)
    for ref in again:
        life = ForkLife(runtime, ref, "run-2", silent)
        await life.create_sandbox()
        await life.run_agent()
        await life.cleanup_sandbox()
    done = await complete(runtime, "w", "run-2")
    assert done.summary["succeeded"] == 2
    assert sorted(agent.runs) == [(0, 1), (1, 1)]


async def test_the_same_name_with_another_prompt_is_refused(runtime: Runtime, config: Make) -> None:
    await drive(runtime, config(), "w")
    with pytest.raises(Exception, match="another prompt"):
        await begin(runtime, config(prompt="else"), "w", "run-2", previous_ended=True)


async def test_a_run_that_died_is_resumed_where_it_was(
    runtime: Runtime, config: Make, provider: FaultyProvider, agent: FakeAgent
) -> None:
    """Fork 0 is done, fork 1 has a sandbox, fork 2 never started."""
    await begin(runtime, config(num_forks=3), "w", "run-1")
    first = ForkLife(runtime, ForkRef(workflow_id="w", fork_num=0), "run-1", silent)
    for stage in (first.create_sandbox, first.health_check, first.run_agent, first.cleanup_sandbox):
        await stage()
    second = ForkLife(runtime, ForkRef(workflow_id="w", fork_num=1), "run-1", silent)
    await second.create_sandbox()
    runtime.slots = type(runtime.slots)()
    await runtime.store.update(
        Orchestration, orchestration_key("w"), lambda it: it.evolve(owner=None)
    )
    done = await drive(runtime, config(num_forks=3), "w", run_id="run-2")
    assert outcomes(done.rows) == [("success", None)] * 3
    assert len(provider.ledger.created) == 3, "the live sandbox is used again"
    assert sorted(agent.runs) == [(0, 1), (1, 1), (2, 1)]
    assert provider.ledger.alive == []


async def test_a_fork_that_dagster_never_ran_is_written_as_lost(
    runtime: Runtime, config: Make
) -> None:
    await begin(runtime, config(num_forks=2), "w", "run-1")
    life = ForkLife(runtime, ForkRef(workflow_id="w", fork_num=0), "run-1", silent)
    for stage in (life.create_sandbox, life.health_check, life.run_agent, life.cleanup_sandbox):
        await stage()
    done = await complete(runtime, "w", "run-1")
    assert outcomes(done.rows) == [("success", None), ("failed", "lost")]
    assert done.error is not None
    assert "1 of 2 forks got lost" in done.error


async def test_settling_a_cancel_ends_sandboxes_and_keeps_results(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    await begin(runtime, config(num_forks=3), "w", "run-1")
    first = ForkLife(runtime, ForkRef(workflow_id="w", fork_num=0), "run-1", silent)
    for stage in (first.create_sandbox, first.health_check, first.run_agent):
        await stage()
    second = ForkLife(runtime, ForkRef(workflow_id="w", fork_num=1), "run-1", silent)
    await second.create_sandbox()
    assert await settle_cancelled(runtime, "run-1") == ["w"]
    forks = await runtime.store.forks("w")
    assert [fork.outcome for fork in forks] == ["success", "cancelled", "cancelled"]
    assert provider.ledger.alive == []
    assert len(await runtime.store.rows(_fork_metrics(), "w")) == 3


async def test_a_cancel_inside_create_does_not_lose_the_sandbox(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    await begin(runtime, config(num_forks=1), "w", "run-1")
    life = ForkLife(runtime, ForkRef(workflow_id="w", fork_num=0), "run-1", silent)
    creating = asyncio.create_task(life.create_sandbox())
    while not await runtime.store.leases("w"):
        await asyncio.sleep(0.001)
    creating.cancel()
    with pytest.raises(asyncio.CancelledError):
        await creating
    await settle_cancelled(runtime, "run-1")
    assert provider.ledger.alive == []
    fork = await runtime.store.need(Fork, fork_key("w", 0))
    assert fork.outcome is Outcome.CANCELLED


async def test_the_run_fails_below_the_success_rate_that_was_asked_for(
    runtime: Runtime, config: Make
) -> None:
    async def half(sandbox: Sandbox, task: Task) -> AgentResult:
        if task.fork_num == 0:
            return AgentResult(outcome=Outcome.FAILED, failure_class=FailureClass.AGENT_FAILED)
        return AgentResult(outcome=Outcome.SUCCESS)

    runtime._agents["fake"] = FakeAgent(half)
    done = await drive(runtime, config(fail_run_below_success_rate=0.6), "w")
    assert done.error == "success rate 50% is below fail_run_below_success_rate (60%)"


async def test_setup_runs_once_and_every_fork_starts_from_its_result(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    setup = "date +%s%N > ../made && echo built > built.txt"
    check = {"command": "test -s built.txt && test -s ../made"}
    done = await drive(runtime, config(num_forks=3, setup_command=setup, health_check=check), "w")
    assert outcomes(done.rows) == [("success", None)] * 3
    assert len(provider.ledger.created) == 4, "one to prepare, three forks"
    assert provider.ledger.alive == []


async def test_a_setup_that_fails_fails_every_fork_without_creating_more(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    done = await drive(runtime, config(setup_command="echo no wheel >&2; exit 9"), "w")
    assert outcomes(done.rows) == [("failed", "setup_failed")] * 2
    assert done.error is not None
    assert "setup_command exited with 9: no wheel" in done.error
    assert len(provider.ledger.created) == 1
    assert provider.ledger.alive == []


def _fork_metrics():  # noqa: ANN202
    from sandbox_pipeline.store import tables

    return tables.fork_metrics


@pytest.mark.parametrize("form", ["plain", "quoted", "base64", "url"])
async def test_a_configuration_with_a_secret_in_it_is_refused_by_the_variables_name(
    runtime: Runtime, config: Make, form: str
) -> None:
    secret = 'ghp_"canary"+1234/' if form == "quoted" else "ghp_canary+1234/"
    runtime.environ = {**runtime.environ, "GITHUB_TOKEN": secret}
    written = {
        "base64": base64.b64encode(f"x:{secret}".encode()).decode(),
        "url": urllib.parse.quote(secret, safe=""),
    }.get(form, secret)
    with pytest.raises(ConfigError, match="holds the value of GITHUB_TOKEN") as caught:
        await begin(runtime, config(prompt=f"clone with {written}"), "w", "run-1")
    assert "canary" not in str(caught.value)
    assert await runtime.store.orchestrations() == []
