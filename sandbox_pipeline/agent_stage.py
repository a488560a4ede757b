"""The agent's part of a fork's life: begun once, followed to its end, result and patch kept."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

from sandbox_pipeline import preparation
from sandbox_pipeline.agents.base import PROMPT_FILE, Task, job_of
from sandbox_pipeline.agents.detached import folder_of, interrupt
from sandbox_pipeline.budgets import limit_usd, spent_usd
from sandbox_pipeline.clock import now
from sandbox_pipeline.errors import AgentError, ProviderError
from sandbox_pipeline.exchange import exchange_folder, has_exchange
from sandbox_pipeline.fork_sandboxes import ForkSandboxes
from sandbox_pipeline.injection import place_of_key
from sandbox_pipeline.journal import (
    ForkJournal,
    JournalReporter,
    artifacts_of,
    counted,
    keep_attempt,
    short,
)
from sandbox_pipeline.orders import Watch, run_obeying
from sandbox_pipeline.records import (
    AgentResult,
    Fork,
    ForkRef,
    Orchestration,
    Outcome,
    Stage,
    Usage,
)
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.sandboxes.base import Sandbox
from sandbox_pipeline.workspace.checkout import take_patch

BREAK_OFF_SECONDS = 1.0
"""For an interrupted agent to come to rest, so that files don't change under the patch."""


class AgentStage:
    """Runs one fork's agent.

    Args:
        runtime: of this process.
        ref: which fork.
        journal: where it is written.
        sandboxes: of the fork.
        orders: what somebody asked of the fork meanwhile.
    """

    def __init__(
        self,
        runtime: Runtime,
        ref: ForkRef,
        journal: ForkJournal,
        sandboxes: ForkSandboxes,
        watch: Callable[[], Watch],
    ) -> None:
        self._runtime = runtime
        self._ref = ref
        self._journal = journal
        self._sandboxes = sandboxes
        self._watch = watch

    async def run(self, fork: Fork, orchestration: Orchestration) -> None:
        """Run the agent, or follow the one that runs already, and keep result and patch.

        Raises:
            AgentError: a success without a patch that can be read.
            ProviderError: the sandbox failed.
            StoppedError: somebody asked the fork to stop.
        """
        if fork.stage is not Stage.AGENT:
            fork = await self._begin(fork, orchestration)
        sandbox = await self._sandboxes.connect(fork, orchestration)
        beat = asyncio.create_task(self._keep_alive(sandbox, orchestration))
        try:
            result = fork.result or await self._result(fork, orchestration, sandbox)
            await self._save(fork, orchestration, sandbox, result)
        finally:
            beat.cancel()
            await asyncio.wait({beat})

    async def break_off(self, fork: Fork, orchestration: Orchestration) -> None:
        """Stop an agent that nobody follows any more, and keep what it has done so far.

        A result that was saved before stays what it is. The cost is what the agent reported last.

        Raises:
            AgentError: a success without a patch that can be read.
            ProviderError: the sandbox failed.
        """
        sandbox = await self._sandboxes.connect(fork, orchestration)
        result = fork.result
        if result is None:
            job = job_of(fork.attempts["agent"])
            await interrupt(sandbox, job, wait_seconds=BREAK_OFF_SECONDS)
            cost = fork.cost_so_far_usd
            result = AgentResult(
                outcome=Outcome.CANCELLED,
                message="cancelled",
                usage=Usage(cost_usd=cost),
                cost_basis="unknown" if cost is None else "computed",
            )
        await self._save(fork, orchestration, sandbox, result)

    async def _result(
        self, fork: Fork, orchestration: Orchestration, sandbox: Sandbox
    ) -> AgentResult:
        config = orchestration.config
        agent = self._runtime.agent(config.agent.kind)
        limit = limit_usd(orchestration, fork)
        attempt = fork.attempts["agent"]
        # Where the job's other files will be, whose folder is made with it.
        prompt_path = f"{folder_of(job_of(attempt))}/{PROMPT_FILE}"
        folder = artifacts_of(orchestration, fork)
        folder.mkdir(parents=True, exist_ok=True)
        await sandbox.write(prompt_path, config.prompt.encode())
        exchange = None
        if has_exchange(orchestration, agent):
            lease_id = await self._sandboxes.lease_id(fork)
            exchange = exchange_folder(self._runtime.settings.home, lease_id)
        task = Task(
            workflow_id=self._ref.workflow_id,
            fork_num=self._ref.fork_num,
            attempt=attempt,
            prompt=config.prompt,
            prompt_path=prompt_path,
            model=config.model,
            config=config.agent.model_copy(update={"max_budget_usd": limit}),
            artifacts=folder,
            environ=self._runtime.environ,
            redactor=self._runtime.redactor(orchestration),
            exchange_dir=exchange,
            network=preparation.network_of(orchestration),
            key_injected=exchange is None and await self._key_injected(orchestration, sandbox),
        )
        try:
            return await run_obeying(
                agent.run(sandbox, task, JournalReporter(self._journal)),
                self._watch(),
                lambda: interrupt(sandbox, job_of(attempt)),
                self._journal.fork,
            )
        except AgentError as error:
            return AgentResult(
                outcome=Outcome.FAILED,
                failure_class=error.failure_class,
                message=short(task.redactor.text(str(error))),
            )

    async def _key_injected(self, orchestration: Orchestration, sandbox: Sandbox) -> bool:
        agent = self._runtime.agent(orchestration.config.agent.kind)
        place = await place_of_key(self._runtime, orchestration, agent, sandbox.sandbox_id)
        if place.warning:
            await self._journal.event("key-in-sandbox", {"reason": place.warning})
        return place.injected

    async def _save(
        self, fork: Fork, orchestration: Orchestration, sandbox: Sandbox, result: AgentResult
    ) -> None:
        began = fork.agent_started_at or now()
        seconds = fork.timings.agent_seconds or now().seconds_since(began)
        redactor = self._runtime.redactor(orchestration)
        result = result.model_copy(update={"message": short(redactor.text(result.message))})
        # Stored before the patch is taken: what was paid for survives a crash from here on.
        await self._journal.change(
            lambda it: it.evolve(
                result=result,
                timings=it.timings.model_copy(update={"agent_seconds": seconds}),
            )
        )
        patch, message = None, result.message
        try:
            patch = await take_patch(
                sandbox,
                orchestration.base_commit or "",
                artifacts_of(orchestration, fork) / "patch.diff",
                redactor,
                max_bytes=int(orchestration.config.max_patch_mb * 1e6),
            )
        except AgentError as error:
            if result.outcome is Outcome.SUCCESS:
                raise
            message = short(f"{message}; {error}")
        if patch is not None and patch.size_bytes == 0 and result.outcome is Outcome.SUCCESS:
            message = short(f"the agent changed nothing. {message}".strip())
        name = "agent-completed" if result.outcome is Outcome.SUCCESS else "agent-failed"

        def saved(it: Fork) -> Fork:
            if it.outcome.is_terminal:
                return it  # two that settle the same cancel: the first one's patch is kept
            return it.evolve(
                outcome=result.outcome,
                failure_class=result.failure_class,
                message=message,
                stage=Stage.METRICS,
                patch=patch,
            )

        await self._journal.change(
            saved,
            name,
            {
                "outcome": result.outcome.value,
                "exit_code": result.exit_code,
                "seconds": round(seconds, 3),
                "message": message[:200],
            },
        )

    async def _keep_alive(self, sandbox: Sandbox, orchestration: Orchestration) -> None:
        grace = orchestration.config.sandbox.orphan_grace_seconds
        while True:
            # A failed extension is no reason to stop the agent; the next one may succeed.
            with contextlib.suppress(ProviderError):
                await sandbox.extend(grace)
            await asyncio.sleep(grace / 3)

    async def _begin(self, fork: Fork, orchestration: Orchestration) -> Fork:
        """Count a new attempt; what an earlier one left is kept beside it."""
        attempt = fork.attempts.get("agent", 0) + 1
        if attempt > 1:
            keep_attempt(artifacts_of(orchestration, fork), attempt - 1)

        def begun(it: Fork) -> Fork:
            return it.evolve(
                stage=Stage.AGENT,
                agent_started_at=now(),
                attempts=counted(it.attempts, "agent"),
                earlier_cost_usd=spent_usd(it),
                cost_so_far_usd=None,
            )

        if attempt == 1:
            return await self._journal.change(begun)
        payload = {"attempt": attempt, "earlier_cost_usd": spent_usd(fork)}
        return await self._journal.change(begun, "agent-retried", payload)
