"""Which steps can start, found without looking at all that are left.

Dagster looks at every step that is left, three times for each step that ends, and at every output
there ever was for each step that starts, so that a fork costs the more, the more forks a run has.
Here a step is looked at once the last that it waits for has ended; what follows from that is left
to Dagster.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self

from dagster._core.execution.plan.active import ActiveExecution
from dagster._core.execution.plan.plan import ExecutionPlan
from dagster._core.execution.plan.state import KnownExecutionState


class IndexedPlan(ExecutionPlan):
    """The given plan, executed as an `IndexedExecution`."""

    def __new__(cls, plan: ExecutionPlan) -> Self:
        """As the given one, whose steps it shares."""
        return super().__new__(cls, *plan)

    def start(self, *args: Any, **options: Any) -> IndexedExecution:
        """See `ExecutionPlan.start`."""
        return IndexedExecution(self, *args, **options)


class IndexedExecution(ActiveExecution):
    """Keeps away from `_pending`, which Dagster looks through, what still waits for a step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        # Before the base's constructor, which looks for the first steps.
        self._waiting: dict[str, set[str]] = {}
        self._missing: dict[str, set[str]] = {}
        self._dependents: dict[str, list[str]] = {}
        super().__init__(*args, **options)

    @property
    def is_complete(self) -> bool:
        """See `ActiveExecution.is_complete`."""
        return not self._waiting and super().is_complete

    def get_known_state(self) -> KnownExecutionState:
        """See `ActiveExecution.get_known_state`."""
        # Made without checking the type of each output.
        return self._plan.known_state._replace(
            previous_retry_attempts=self._retry_state.snapshot_attempts(),
            dynamic_mappings=dict(self._completed_dynamic_outputs),
            ready_outputs=self._step_outputs,
        )

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """See `ActiveExecution.__exit__`, which complains of what is pending."""
        self._pending |= self._waiting
        super().__exit__(exc_type, exc_value, traceback)

    def _update(self) -> None:
        if self._new_dynamic_mappings:
            self._pending |= self._plan.resolve(self._completed_dynamic_outputs)
            self._new_dynamic_mappings = False
        if self._step_dependency_config.require_upstream_step_success:
            self._put_off()
        if self._pending or self._waiting_to_retry:
            super()._update()

    def _put_off(self) -> None:
        for step, needed in list(self._pending.items()):
            missing = {it for it in needed if not self._is_resolved(it)}
            if missing:
                self._waiting[step] = self._pending.pop(step)
                self._missing[step] = missing
                for other in missing:
                    self._dependents.setdefault(other, []).append(step)

    def _is_resolved(self, step: str) -> bool:
        ends = (self._success, self._skipped, self._failed, self._abandoned)
        return any(step in ended for ended in ends)

    def _mark_complete(self, step_key: str) -> None:
        super()._mark_complete(step_key)
        # One that is to be tried again has not ended.
        if not self._is_resolved(step_key):
            return
        for step in self._dependents.pop(step_key, ()):
            self._missing[step].discard(step_key)
            if not self._missing[step]:
                del self._missing[step]
                self._pending[step] = self._waiting.pop(step)
