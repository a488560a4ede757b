"""Orders through the store, budgets, limits, and two runs that both think they are the one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox_pipeline.agents.base import Task
from sandbox_pipeline.agents.command import CommandAgent
from sandbox_pipeline.budgets import spent_usd
from sandbox_pipeline.clock import now
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import ErrorKind, OwnershipError, ProviderError
from sandbox_pipeline.lifecycle import ForkLife
from sandbox_pipeline.orchestrating import begin, complete
from sandbox_pipeline.orders import StoppedError, obeying
from sandbox_pipeline.records import (
    AgentResult,
    Control,
    Fork,
    ForkRef,
    Orchestration,
    Outcome,
    Usage,
    fork_key,
    orchestration_key,
)
from sandbox_pipeline.runtime import Runtime, silent
from sandbox_pipeline.sandboxes.base import WORKSPACE, Sandbox
from sandbox_pipeline.testing import FakeAgent, FaultyProvider, drive
from tests.processes import live_sandboxes, started, wait_until_gone
from tests.test_cli import CLI, cli

Make = Callable[..., OrchestrationConfig]
SLOW = {"kind": "command", "command": "sh -c 'echo begun > work; sleep 60'"}


async def order(runtime: Runtime, control: Control, fork_num: int | None = None) -> None:
    if fork_num is None:
        key = orchestration_key("w")
        await runtime.store.update(Orchestration, key, lambda it: it.evolve(control=control))
    else:
        key = fork_key("w", fork_num)
        await runtime.store.update(Fork, key, lambda it: it.evolve(control=control))


async def until(condition: Callable[[list[Fork]], bool], runtime: Runtime) -> list[Fork]:
    forks: list[Fork] = []
    for _ in range(400):
        forks = await runtime.store.forks("w")
        if forks and condition(forks):
            return forks
        await asyncio.sleep(0.05)
    msg = f"never: {forks}"
    raise AssertionError(msg)


def working(count: int) -> Callable[[list[Fork]], bool]:
    return lambda forks: sum(fork.attempts.get("agent") == 1 for fork in forks) == count


@pytest.mark.parametrize("ends", ["an error", "a bad result", "a good result"])
async def test_a_cancel_that_spoilt_the_work_is_obeyed_before_it_was_read(
    runtime: Runtime, config: Make, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """The run's own process stops the agents at once; the op reads orders twice a second."""
    monkeypatch.setattr("sandbox_pipeline.orders.POLL_SECONDS", 3600)
    await begin(runtime, config(), "w", "run-1")

    async def work() -> AgentResult:
        await order(runtime, Control.CANCEL)
        if ends == "an error":
            raise ProviderError(ErrorKind.GONE, "its sandbox was ended")
        if ends == "a good result":
            return AgentResult(outcome=Outcome.SUCCESS)
        return AgentResult(outcome=Outcome.FAILED, exit_code=130)

    watch = runtime.orders.watch(ForkRef(workflow_id="w", fork_num=0), "run-1")
    if ends == "a good result":
        assert (await obeying(work(), watch)).outcome is Outcome.SUCCESS
        return
    with pytest.raises(StoppedError, match="cancelled by command"):
        await obeying(work(), watch)


async def test_cancelling_one_fork_stops_its_agent_and_keeps_its_patch(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    agent = {"kind": "command", "command": "sh -c 'echo a > work; test {fork_num} = 1 || sleep 60'"}
    running = asyncio.create_task(drive(runtime, config(agent=agent), "w"))
    await until(lambda forks: working(2)(forks) and forks[1].outcome.is_terminal, runtime)
    await order(runtime, Control.CANCEL, 0)
    began = time.monotonic()
    done = await running
    assert time.monotonic() - began < 10
    assert [row["outcome"] for row in done.rows] == ["cancelled", "success"]
    assert done.rows[0]["insertions"] == 1, "what it had done so far"
    assert done.rows[0]["message"] == "cancelled by command"
    assert provider.ledger.alive == []


async def test_a_queued_fork_that_is_cancelled_never_gets_a_sandbox(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    agent = {"kind": "command", "command": "sleep 2"}
    running = asyncio.create_task(drive(runtime, config(agent=agent, max_concurrent=1), "w"))
    forks = await until(working(1), runtime)
    queued = 1 - next(fork.fork_num for fork in forks if fork.attempts.get("agent"))
    await order(runtime, Control.CANCEL, queued)
    done = await running
    assert sorted(str(row["outcome"]) for row in done.rows) == ["cancelled", "success"]
    assert len(provider.ledger.created) == 1


async def test_a_paused_orchestration_starts_no_fork_until_it_is_resumed(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    agent = {"kind": "command", "command": "sleep 1"}
    running = asyncio.create_task(
        drive(runtime, config(agent=agent, num_forks=3, max_concurrent=1), "w")
    )
    await until(working(1), runtime)
    await order(runtime, Control.PAUSE)
    await until(lambda forks: any(fork.ended_at for fork in forks), runtime)
    await asyncio.sleep(1)
    assert len(provider.ledger.created) == 1
    await order(runtime, Control.RUN)
    done = await running
    assert done.summary["succeeded"] == 3


async def test_an_agent_without_output_is_a_timeout_that_says_so(
    runtime: Runtime, config: Make
) -> None:
    agent = {**SLOW, "idle_timeout_seconds": 0.5}
    done = await drive(runtime, config(agent=agent, num_forks=1), "w")
    [row] = done.rows
    assert row["outcome"] == "timeout"
    assert row["message"] == (
        "the agent gave no output for longer than agent.idle_timeout_seconds (0.5 s)"
    )
    assert row["insertions"] == 1


async def test_a_full_workspace_says_that_the_disk_limit_ended_the_sandbox(
    runtime: Runtime, config: Make
) -> None:
    agent = {"kind": "command", "command": "sh -c 'head -c 60000000 /dev/zero > big; sleep 60'"}
    sandbox = {"provider": "local", "disk_mb": 16}
    done = await drive(runtime, config(agent=agent, num_forks=1, sandbox=sandbox), "w")
    [row] = done.rows
    assert (row["outcome"], row["failure_class"]) == ("failed", "sandbox_lost")
    assert "disk" in str(row["message"])


class Spender(FakeAgent):
    """Spends in steps of ten cents and looks at its limit before each, as a metered agent does."""

    def __init__(self, wanted_usd: float, *, obedient: bool = True) -> None:
        super().__init__()
        self.limits: list[float | None] = []
        self._wanted_usd = wanted_usd
        self._obedient = obedient

    async def run(self, sandbox: Sandbox, task: Task, reporter: object) -> AgentResult:
        self.runs.append((task.fork_num, task.attempt))
        limit = task.config.max_budget_usd
        self.limits.append(limit)
        spent, outcome = 0.0, Outcome.SUCCESS
        while spent < self._wanted_usd - 1e-9:
            if self._obedient and limit is not None and spent >= limit:
                outcome = Outcome.BUDGET_EXCEEDED
                break
            spent += 0.1
            await reporter.progress("spending", cost_usd=spent)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType]
            await asyncio.sleep(0.05)
        await sandbox.write(f"{WORKSPACE}/spent", f"{spent}".encode())
        return AgentResult(outcome=outcome, usage=Usage(cost_usd=spent), cost_basis="computed")


async def test_the_orchestrations_budget_is_shared_and_kept_to_within_one_request_a_fork(
    runtime: Runtime, config: Make
) -> None:
    agent = Spender(5.0)
    runtime._agents["fake"] = agent
    done = await drive(runtime, config(num_forks=4, max_concurrent=4, budget_usd=1.0), "w")
    assert {row["outcome"] for row in done.rows} == {"budget_exceeded"}
    spent = sum(float(row["cost_usd"]) for row in done.rows)
    assert 1.0 <= spent <= 1.0 + 4 * 0.1 + 1e-9
    assert [limit is not None and limit <= 0.25 + 1e-9 for limit in agent.limits] == [True] * 4


async def test_what_a_fork_did_not_spend_is_there_for_the_next(
    runtime: Runtime, config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    settle = runtime.store.settle

    async def slowly(*fork: Any, **spent: Any) -> None:
        await asyncio.sleep(0.2)
        await settle(*fork, **spent)

    monkeypatch.setattr(runtime.store, "settle", slowly)
    agent = Spender(0.1)
    runtime._agents["fake"] = agent
    done = await drive(runtime, config(num_forks=3, max_concurrent=1, budget_usd=0.9), "w")
    assert done.summary["succeeded"] == 3
    assert agent.limits == pytest.approx([0.3, 0.4, 0.7])


async def test_a_budget_that_is_used_up_starts_no_further_fork(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    runtime._agents["fake"] = Spender(5.0)
    fields = {"kind": "fake", "max_budget_usd": 0.5}
    done = await drive(
        runtime, config(num_forks=3, max_concurrent=1, budget_usd=0.6, agent=fields), "w"
    )
    assert [row["outcome"] for row in done.rows] == ["budget_exceeded"] * 3
    assert len(provider.ledger.created) == 1
    messages = [str(row["message"]) for row in done.rows]
    assert sum("less than agent.max_budget_usd (0.5)" in text for text in messages) == 2


async def test_an_agent_that_minds_no_limit_is_stopped(runtime: Runtime, config: Make) -> None:
    runtime._agents["fake"] = Spender(1000.0, obedient=False)
    done = await drive(runtime, config(num_forks=1, budget_usd=0.3), "w")
    [row] = done.rows
    assert row["outcome"] == "budget_exceeded"
    assert "budget" in str(row["message"])
    assert 0.3 <= float(row["cost_usd"]) < 10


async def test_the_days_budget_holds_over_orchestrations(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    runtime.settings = replace(runtime.settings, daily_budget_usd=1.0)
    runtime._agents["fake"] = Spender(0.8)
    fields = {"kind": "fake", "max_budget_usd": 0.8}
    first = await drive(runtime, config(num_forks=1, agent=fields), "w")
    second = await drive(runtime, config(num_forks=1, agent=fields), "v")
    assert first.rows[0]["outcome"] == "success"
    assert second.rows[0]["outcome"] == "budget_exceeded"
    assert "daily_budget_usd: 0.2000 of 1 US dollars are left" in str(second.rows[0]["message"])
    assert len(provider.ledger.created) == 1


async def test_what_a_lost_attempt_cost_is_counted_and_its_log_is_kept(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    ref = ForkRef(workflow_id="w", fork_num=0)
    runtime._agents["fake"] = Spender(0.3)
    made = config(num_forks=1, agent={"kind": "fake", "max_budget_usd": 1.0})
    await begin(runtime, made, "w", "run-1")
    first = ForkLife(runtime, ref, "run-1", silent)
    await first.create_sandbox()
    await first.health_check()
    crashed = asyncio.create_task(first.run_agent())
    await until(lambda forks: forks[0].cost_so_far_usd is not None, runtime)
    crashed.cancel()
    await asyncio.wait({crashed})
    fork = (await runtime.store.forks("w"))[0]
    lost = spent_usd(fork)
    assert lost is not None
    log = Path((await runtime.store.need(Orchestration, orchestration_key("w"))).artifacts)
    (log / "fork_000" / "stdout.log").write_text("attempt one", encoding="utf-8")
    await provider.inner.kill(fork.sandbox_id or "")
    runtime.slots = type(runtime.slots)()
    await begin(runtime, made, "w", "run-2", previous_ended=True)
    second = ForkLife(runtime, ref, "run-2", silent)
    for stage in (second.create_sandbox, second.health_check, second.run_agent):
        await stage()
    await second.cleanup_sandbox()
    done = await complete(runtime, "w", "run-2")
    [row] = done.rows
    assert (row["outcome"], row["agent_attempts"]) == ("success", 2)
    assert row["cost_usd"] == pytest.approx(lost + 0.3)
    kept = log / "fork_000" / "attempt_1" / "stdout.log"
    assert kept.read_text(encoding="utf-8") == "attempt one"


async def test_a_run_that_lost_the_orchestration_can_write_and_end_nothing(
    runtime: Runtime, config: Make, provider: FaultyProvider
) -> None:
    ref = ForkRef(workflow_id="w", fork_num=0)
    await begin(runtime, config(num_forks=1), "w", "run-1")
    zombie = ForkLife(runtime, ref, "run-1", silent)
    await zombie.create_sandbox()
    await begin(runtime, config(num_forks=1), "w", "run-2", previous_ended=True)
    before = await runtime.store.forks("w")
    for stage in (zombie.health_check, zombie.run_agent, zombie.cleanup_sandbox):
        with pytest.raises(OwnershipError, match="owned by run run-2"):
            await stage()
    with pytest.raises(OwnershipError):
        await complete(runtime, "w", "run-1")
    assert await runtime.store.forks("w") == before
    assert len(provider.ledger.alive) == 1
    runtime.slots = type(runtime.slots)()
    done = await drive(runtime, config(num_forks=1), "w", run_id="run-2")
    assert done.rows[0]["outcome"] == "success"
    assert len(provider.ledger.created) == 1, "the zombie's sandbox was taken over"
    assert provider.ledger.alive == []


async def test_a_zombies_agent_goes_on_under_the_run_that_took_over(
    runtime: Runtime, config: Make
) -> None:
    agent = {"kind": "command", "command": "sh -c 'echo run >> runs; sleep 3'"}
    runtime._agents["command"] = CommandAgent()
    first = asyncio.create_task(drive(runtime, config(num_forks=1, agent=agent), "w"))
    await until(working(1), runtime)
    key = orchestration_key("w")

    def silent_for_long(it: Orchestration) -> Orchestration:
        assert it.owner is not None
        long_ago = now().model_copy(update={"monotonic": now().monotonic - 100})
        return it.evolve(owner=it.owner.model_copy(update={"heartbeat": long_ago}))

    await runtime.store.update(Orchestration, key, silent_for_long)
    other = Runtime.open(home=runtime.settings.home)
    try:
        second = await drive(other, config(num_forks=1, agent=agent), "w", run_id="run-2")
    finally:
        await other.close()
    with pytest.raises(OwnershipError):
        await first
    [row] = second.rows
    assert (row["outcome"], row["agent_attempts"], row["insertions"]) == ("success", 1, 1)


def test_a_stopped_run_is_taken_over_and_touches_nothing_when_it_wakes_up(
    home: Path, repo: Path
) -> None:
    """SIGSTOP for longer than a run may be silent, then SIGCONT beside the new owner."""
    environ = {**os.environ, "SANDBOX_PIPELINE_SILENT_SECONDS": "4"}
    agent = "sh -c 'echo run >> runs; while ! test -e ../go; do sleep 0.2; done'"
    arguments = [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", "2",
                 "--workflow-id", "w", "--json", "--command", agent]  # fmt: skip
    with started(arguments, env=environ, stdout=subprocess.PIPE) as first:
        _wait_for(lambda: _working() == 2)
        before = live_sandboxes(home)
        os.kill(first.pid, signal.SIGSTOP)
        time.sleep(5)
        with started(arguments, env=environ, stdout=subprocess.PIPE) as second:
            _wait_for(lambda: cli("events", "w").stdout.count("fork-resumed") == 2)
            os.kill(first.pid, signal.SIGCONT)
            first.communicate(timeout=60)
            assert first.returncode != 0, "it must not claim a success that is another's"
            assert live_sandboxes(home) == before
            for name in before:
                (home / "sandboxes" / name / "home" / "go").touch()
            out, _ = second.communicate(timeout=120)
    forks = json.loads(out)["forks"]
    assert [fork["outcome"] for fork in forks] == ["success"] * 2
    assert [fork["insertions"] for fork in forks] == [1, 1], "one line for each run of the agent"
    assert sorted(fork["sandbox_id"] for fork in forks) == before
    assert wait_until_gone(home, 10) == []


def test_pause_status_resume_and_cancel_of_a_fork_on_the_command_line(
    home: Path, repo: Path
) -> None:
    agent = "sh -c 'echo a > work; test {fork_num} = 0 && sleep 60; sleep 2'"
    with started(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", "3", "--max-concurrent",
         "1", "--workflow-id", "w", "--command", agent, "--json"],
        stdout=subprocess.PIPE,
    ) as process:  # fmt: skip
        _wait_for(lambda: _working() == 1)
        assert "sandbox-pipeline resume w" in cli("pause", "w").stdout
        status = json.loads(cli("status", "w", "--json").stdout)
        assert status["state"] == "pause"
        assert [fork["outcome"] for fork in status["forks"]].count("running") == 1
        assert "goes on in run" in cli("resume", "w").stdout
        _wait_for(lambda: _fork(0)["stage"] == "agent")
        cancelled = cli("cancel", "w", "--fork", "0")
        assert "fork 0 of w ended as cancelled" in cancelled.stdout, cancelled.stderr
        watched = [
            json.loads(line) for line in cli("status", "--watch", "--json").stdout.splitlines()
        ]
        assert watched[-1]["state"] == "complete"
        out, _ = process.communicate(timeout=60)
    forks = json.loads(out)["forks"]
    assert [fork["outcome"] for fork in forks] == ["cancelled", "success", "success"]
    assert forks[0]["insertions"] == 1
    assert "complete already" in cli("resume", "w").stdout
    assert cli("pause", "w").returncode == 2
    assert "has ended already" in cli("cancel", "w", "--fork", "1").stdout
    assert "is not one of 0 to 2" in cli("cancel", "w", "--fork", "9").stderr
    assert "state: complete" in cli("status", "w").stdout


def test_resume_takes_up_an_orchestration_whose_run_died(home: Path, repo: Path) -> None:
    with started(
        [*CLI, "run", "--repo", str(repo), "--prompt", "p", "--forks", "2",
         "--workflow-id", "w", "--command", "sh -c 'echo run >> runs; sleep 4'"],
        stdout=subprocess.DEVNULL,
    ):  # fmt: skip
        _wait_for(lambda: _working() == 2)
    assert json.loads(cli("status", "--json").stdout)["state"] == "left"
    done = cli("resume", "w", "--json")
    assert done.returncode == 0, done.stderr
    forks = json.loads(done.stdout)["forks"]
    assert [(fork["outcome"], fork["insertions"]) for fork in forks] == [("success", 1)] * 2
    import dagster as dg

    with dg.DagsterInstance.get() as instance:
        assert [run.status.value for run in instance.get_runs()] == ["SUCCESS", "FAILURE"]


def _fork(fork_num: int) -> dict[str, object]:
    return json.loads(cli("status", "w", "--json").stdout)["forks"][fork_num]


def _working() -> int:
    done = cli("status", "w", "--json")
    if not done.stdout:
        return 0
    forks = json.loads(done.stdout)["forks"]
    return sum(f["attempts"].get("agent") == 1 and f["outcome"] == "running" for f in forks)


def _wait_for(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)
