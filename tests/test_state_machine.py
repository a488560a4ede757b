"""Properties of the stored state under any order of events, runs and deaths."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from sandbox_pipeline.budgets import settle
from sandbox_pipeline.clock import now
from sandbox_pipeline.config import parse_config
from sandbox_pipeline.errors import BudgetError, OwnershipError
from sandbox_pipeline.leasing import new_lease
from sandbox_pipeline.ownership import claimed, held_by
from sandbox_pipeline.records import (
    AgentResult,
    Fork,
    Lease,
    Orchestration,
    Outcome,
    SandboxState,
    Usage,
    fork_key,
    orchestration_key,
)
from sandbox_pipeline.store import Store
from sandbox_pipeline.store.spending import Claim
from sandbox_pipeline.store.statements import TerminalError

T = TypeVar("T")
FORKS = 4
SLOTS = 2
ATTEMPTS = 3
BUDGET_USD = 1.0
REQUEST_USD = 0.07
TERMINAL = [outcome for outcome in Outcome if outcome.is_terminal]
forks = st.integers(0, FORKS - 1)


class Orchestrations(RuleBasedStateMachine):
    """Runs that come, go silent and wake up, and what each of them tries to write."""

    def __init__(self) -> None:
        super().__init__()
        self._folder = tempfile.TemporaryDirectory()
        self._loop = asyncio.new_event_loop()
        self._store = Store.open(f"sqlite:///{Path(self._folder.name) / 's.db'}")
        self._runs: list[str] = []
        self._final: dict[int, Outcome] = {}
        self._spent = dict.fromkeys(range(FORKS), 0.0)
        config = parse_config({"prompt": "p", "num_forks": FORKS, "agent": {"command": "true"}})
        self._do(
            self._store.create_missing(
                [
                    Orchestration(
                        workflow_id="w", config=config, provider="local", network="none",
                        artifacts="/nowhere", requested_at=now(),
                    ),
                    *(Fork(workflow_id="w", fork_num=n) for n in range(FORKS)),
                ]
            )
        )  # fmt: skip

    def teardown(self) -> None:
        self._do(self._store.close())
        self._loop.close()
        self._folder.cleanup()

    def _do(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    def _orchestration(self) -> Orchestration:
        return self._do(self._store.need(Orchestration, orchestration_key("w")))

    def _fork(self, number: int) -> Fork:
        return self._do(self._store.need(Fork, fork_key("w", number)))

    @rule(previous_ended=st.booleans())
    def a_run_comes(self, previous_ended: bool) -> None:
        run_id = f"run-{len(self._runs)}"
        refused = bool(self._runs) and not previous_ended
        try:
            self._do(
                self._store.update(
                    Orchestration,
                    orchestration_key("w"),
                    lambda it: claimed(it, run_id, previous_ended=previous_ended),
                )
            )
        except OwnershipError:
            assert refused
        else:
            assert not refused
            self._runs.append(run_id)

    @precondition(lambda self: self._runs)
    @rule(data=st.data(), number=forks, outcome=st.sampled_from(TERMINAL))
    def any_run_ends_a_fork(self, data: st.DataObject, number: int, outcome: Outcome) -> None:
        """Also one that was replaced: only the owner's write may come through."""
        run_id = data.draw(st.sampled_from(self._runs))
        before = self._fork(number)
        try:
            self._do(
                self._store.update(
                    Fork,
                    fork_key("w", number),
                    lambda it: it.evolve(outcome=outcome),
                    fence=held_by(run_id),
                )
            )
        except OwnershipError:
            assert run_id != self._runs[-1]
            assert self._fork(number) == before
        except TerminalError:
            assert self._final[number] is not outcome
        else:
            assert run_id == self._runs[-1]
            self._final.setdefault(number, outcome)

    @precondition(lambda self: self._runs)
    @rule(data=st.data(), number=forks)
    def any_run_counts_an_attempt_and_asks_for_a_slot(
        self, data: st.DataObject, number: int
    ) -> None:
        run_id = data.draw(st.sampled_from(self._runs))
        attempt = self._fork(number).attempts.get("create", 0) + 1
        if attempt > ATTEMPTS:
            return
        lease = new_lease(self._orchestration(), run_id, fork_num=number, attempt=attempt)
        with contextlib.suppress(OwnershipError):
            admitted = self._do(self._store.admit(lease, SLOTS, fence=held_by(run_id)))
            assert run_id == self._runs[-1]
            if admitted is not None:
                self._do(
                    self._store.update(
                        Fork,
                        fork_key("w", number),
                        lambda it: it.evolve(attempts={"create": attempt}),
                    )
                )

    @rule(data=st.data(), state=st.sampled_from(list(SandboxState)))
    def a_sandbox_changes(self, data: st.DataObject, state: SandboxState) -> None:
        leases = self._do(self._store.leases("w"))
        if leases:
            lease = data.draw(st.sampled_from(sorted(leases, key=lambda it: it.lease_id)))
            name = lease.sandbox_id or f"sbx-{lease.lease_id}"
            self._do(
                self._store.update(
                    Lease, lease.key, lambda it: it.evolve(state=state, sandbox_id=name)
                )
            )

    @rule(number=forks, requests=st.integers(0, 20), known=st.booleans())
    def a_fork_spends_and_ends(self, number: int, requests: int, known: bool) -> None:
        """Its agent looks at its limit before each request, so it exceeds that by one at most."""
        claim = Claim("w", number, FORKS, None, BUDGET_USD, None)
        if self._spent[number]:
            return
        try:
            limit = self._do(self._store.reserve(claim))
        except BudgetError:
            return
        if limit is None:
            return
        spent = 0.0
        for _ in range(requests):
            if spent >= limit:
                break
            spent += REQUEST_USD
        self._spent[number] = spent
        fork = self._fork(number).evolve(
            budget_usd=limit,
            agent_started_at=now(),
            result=AgentResult(
                outcome=Outcome.SUCCESS, usage=Usage(cost_usd=spent if known else None)
            ),
        )
        self._do(settle(self._store, fork))

    @invariant()
    def terminal_is_final(self) -> None:
        for number, outcome in self._final.items():
            assert self._fork(number).outcome is outcome

    @invariant()
    def slots_are_never_exceeded_and_leases_never_overlap(self) -> None:
        leases = self._do(self._store.leases("w"))
        assert len(leases) <= SLOTS
        holders = [lease.fork_num for lease in leases]
        assert len(set(holders)) == len(holders), "one sandbox a fork"

    @invariant()
    def attempts_keep_to_the_policy(self) -> None:
        for number in range(FORKS):
            assert self._fork(number).attempts.get("create", 0) <= ATTEMPTS

    @invariant()
    def the_budget_is_overshot_by_one_request_a_fork_at_most(self) -> None:
        working = sum(spent > 0 for spent in self._spent.values())
        assert sum(self._spent.values()) <= BUDGET_USD + working * REQUEST_USD + 1e-9

    @invariant()
    def one_owner_and_its_epoch_counts(self) -> None:
        owner = self._orchestration().owner
        assert (owner.run_id if owner else None) == (self._runs[-1] if self._runs else None)
        assert (owner.epoch if owner else 0) == len(self._runs)


TestOrchestrations = Orchestrations.TestCase
TestOrchestrations.settings = settings(
    max_examples=25,
    stateful_step_count=25,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    database=None,
)
