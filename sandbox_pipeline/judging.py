"""Lets a model compare the patches that checks can't tell apart, once all forks are done.

Each answer is stored with what it cost before the next is asked for, so that a run which was
killed goes on where it was. Whatever goes wrong with the judge is a reason in words, never a
failure of the orchestration: the ranking is then made without it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sandbox_pipeline.agents.anthropic_judge import (
    Answer,
    AnthropicJudge,
    Excerpt,
    JudgeError,
    check_judge,
    excerpt,
    named,
    one_line,
)
from sandbox_pipeline.agents.metering import Meter
from sandbox_pipeline.agents.models import prices_from_environ
from sandbox_pipeline.budgets import judge_claim_of, settle_judge
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.errors import BudgetError, OwnershipError, PipelineError, StoreError
from sandbox_pipeline.leasing import shielded
from sandbox_pipeline.ownership import held_by
from sandbox_pipeline.ranking import contenders
from sandbox_pipeline.records import (
    Control,
    Event,
    Fork,
    Judging,
    Opinion,
    Orchestration,
)
from sandbox_pipeline.redaction import Redactor
from sandbox_pipeline.results import fork_of, judging_text, ranking_of, read_patch
from sandbox_pipeline.runtime import Announce, Runtime
from sandbox_pipeline.tournament import Pair, missing, pairs_of

logger = logging.getLogger(__name__)

MAX_AT_ONCE = 4
GIVE_UP_AFTER = 6
"""Unusable answers, while there is no usable one."""
POLL_SECONDS = 0.25


def check(runtime: Runtime, config: OrchestrationConfig) -> None:
    """Whether the judge that is asked for could be asked.

    Raises:
        ConfigError: naming the field or the variable and the remedy.
    """
    if config.judge.enabled:
        check_judge(runtime.environ)


async def judge(
    runtime: Runtime, orchestration: Orchestration, run_id: str, announce: Announce
) -> Orchestration:
    """Have the best patches compared, where that is asked for and helps.

    Returns:
        The orchestration with what came of it.

    Raises:
        OwnershipError: another run owns it now.
        StoreError: the state can't be written.
    """
    if not orchestration.config.judge.enabled or orchestration.complete:
        return orchestration
    if orchestration.judging is not None and orchestration.judging.ended:
        return orchestration
    court = _Court(runtime, orchestration, run_id, announce)
    try:
        setback = await court.sit()
    except (StoreError, OwnershipError):
        raise
    except (PipelineError, OSError) as error:
        setback = str(error)
    except Exception as error:
        logger.exception("%s: unexpected error of the judge", orchestration.key)
        setback = f"unexpected {type(error).__name__}: {error}"
    return await court.close(setback)


@dataclass
class _Court:
    """The judge at work on one orchestration.

    Attributes:
        judging: as stored last.
        stopped: why no further question is asked; empty while they are.
    """

    runtime: Runtime
    orchestration: Orchestration
    run_id: str
    announce: Announce
    stopped: str = ""
    judging: Judging = field(init=False)
    _left: list[Pair] = field(default_factory=list[Pair])
    _excerpts: dict[int, Excerpt] = field(default_factory=dict[int, Excerpt])

    def __post_init__(self) -> None:
        self._config = self.orchestration.config.judge
        self.judging = self.orchestration.judging or Judging(model=self._config.model)
        self._redactor: Redactor = self.runtime.redactor(self.orchestration)
        self._budget: float | None = None
        self._deadline = time.monotonic() + self._config.timeout_seconds

    async def sit(self) -> str:
        """Ask all that is still to be asked; why the opinions don't count, or nothing."""
        if self.orchestration.control is Control.CANCEL:
            return "the orchestration was cancelled"
        if self.orchestration.fatal is not None:
            return "the orchestration failed"
        forks = await self.runtime.store.forks(self.orchestration.workflow_id)
        if self.orchestration.judging is None:
            ranked = await asyncio.to_thread(ranking_of, self.orchestration, forks)
            entrants = contenders(ranked)
            if len(entrants) < 2:
                return (
                    "there are no two different patches that could win"
                    if not entrants
                    else ("only one patch is ahead, so there is nothing to compare")
                )
            pairs = pairs_of(entrants, self._config.max_comparisons)
            taking_part = {number for pair in pairs for number in pair}
            await self._change(
                entrants=tuple(number for number in entrants if number in taking_part),
                pairs=tuple(pairs),
            )
        await asyncio.to_thread(self._read_patches, forks)
        partial = tuple(number for number, it in sorted(self._excerpts.items()) if it.partial)
        await self._change(partial=partial)
        self._budget = budget = await self._reserve()
        if self.stopped:
            return self.stopped
        meter = Meter(prices_from_environ(self.runtime.environ), budget, None)
        if self.judging.sums:
            meter.restore(self.judging.sums)
        self._left = missing(self.judging)
        asked_for = {"model": self._config.model, "patches": len(self.judging.entrants)}
        await self._event("judge-started", {**asked_for, "questions": len(self._left)})
        async with AnthropicJudge(
            model=self._config.model,
            rubric=self._config.rubric,
            prompt=self._redactor.text(self.orchestration.config.prompt),
            environ=self.runtime.environ,
            meter=meter,
        ) as asked:
            results = await asyncio.gather(
                *(self._work(asked) for _ in range(MAX_AT_ONCE)), return_exceptions=True
            )
        for result in results:
            if result is not None:
                raise result
        return self.stopped

    async def close(self, setback: str) -> Orchestration:
        """Store that it is over, and how; give back what was reserved."""
        await self._change(ended=True, setback=one_line(self._redactor.text(setback)))
        await settle_judge(self.runtime.store, self.orchestration)
        payload = {
            "judge": judging_text(self.judging),
            "answers": len(self.judging.opinions),
            "cost_usd": self.judging.usage.cost_usd,
        }
        await self._event("patches-judged", payload)
        return self.orchestration

    async def _event(self, name: str, payload: Mapping[str, Any]) -> None:
        event = Event(
            name=name,
            workflow_id=self.orchestration.workflow_id,
            time=time.time(),
            payload=dict(payload),
        )
        await self.runtime.store.append(event, fence=held_by(self.run_id))
        self.announce(event)

    def _read_patches(self, forks: Sequence[Fork]) -> None:
        for number in self.judging.entrants:
            fork = fork_of(forks, number)
            patch = self._redactor.clean(read_patch(fork))[0]
            size = fork.patch.size_bytes if fork.patch is not None else 0
            truncated = fork.patch is not None and fork.patch.truncated
            self._excerpts[number] = excerpt(number, patch, size if truncated else len(patch))

    async def _reserve(self) -> float | None:
        """The most US dollars to spend, None: no limit; waits for forks of other orchestrations."""
        claim = judge_claim_of(self.orchestration, self.runtime.settings.daily_budget_usd)
        if claim is None:
            return self._config.max_budget_usd
        while not self._late():
            try:
                amount = await self.runtime.store.reserve(claim)
            except BudgetError as error:
                self.stopped = str(error)
                return None
            if amount is not None:
                return amount
            await asyncio.sleep(POLL_SECONDS)
        return None

    async def _work(self, asked: AnthropicJudge) -> None:
        while self._left and not self.stopped and not self._late():
            if asked.meter.exhausted:
                self.stopped = f"what it may spend is used up ({self._budget:g} US dollars)"
                return
            first, second = self._left.pop(0)
            try:
                answer = await asked.ask(self._excerpts[first], self._excerpts[second])
            except JudgeError as error:
                # Those that are under way are still waited for: they are paid for.
                self.stopped = self.stopped or str(error)
                return
            # Cancelled or not, an answer that was paid for is kept.
            await shielded(self._keep(first, second, answer, asked.meter))
            self._give_up_if_hopeless()

    async def _keep(self, first: int, second: int, answer: Answer, meter: Meter) -> None:
        reason = named(self._redactor.text(answer.reason), first, second)
        opinion = Opinion(
            first=first,
            second=second,
            pick=None if answer.pick is None else (first, second)[answer.pick],
            usable=answer.usable,
            reason=one_line(reason),
        )

        def add(it: Orchestration) -> Orchestration:
            # The sums of now: those of an answer that is stored a moment later may be in them
            # already, and must not be lost again.
            judging = it.judging or self.judging
            return it.evolve(
                judging=judging.model_copy(
                    update={
                        "opinions": (*judging.opinions, opinion),
                        "usage": meter.usage,
                        "sums": meter.dump(),
                    }
                )
            )

        await self._update(add)

    def _give_up_if_hopeless(self) -> None:
        opinions = self.judging.opinions
        if len(opinions) >= GIVE_UP_AFTER and not any(it.usable for it in opinions):
            last = opinions[-1].reason
            self.stopped = f"none of its first {len(opinions)} answers was usable, such as: {last}"

    def _late(self) -> bool:
        if not self.stopped and time.monotonic() > self._deadline:
            limit = self._config.timeout_seconds
            self.stopped = f"it took longer than judge.timeout_seconds ({limit:g} s)"
        return bool(self.stopped)

    async def _change(self, **changes: object) -> None:
        def change(it: Orchestration) -> Orchestration:
            return it.evolve(judging=(it.judging or self.judging).model_copy(update=changes))

        await self._update(change)

    async def _update(self, change: Callable[[Orchestration], Orchestration]) -> None:
        self.orchestration = await self.runtime.store.update(
            Orchestration,
            self.orchestration.key,
            change,
            fence=held_by(self.run_id),
        )
        self.judging = self.orchestration.judging or self.judging
