"""What executors have in common whose ops run elsewhere: on Celery workers, in pods.

A run keeps at most `max_concurrent` ops under way. Since later stages go first, these are at
most as many forks as may have a sandbox, and none takes up a worker only to wait for its turn.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import dagster as dg
from dagster._core.executor.step_delegating import StepDelegatingExecutor
from dagster._core.system_config.objects import ResolvedRunConfig

from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.defs.executor import GuardedExecutor

if TYPE_CHECKING:
    from dagster._core.execution.context.system import PlanOrchestrationContext
    from dagster._core.execution.plan.plan import ExecutionPlan


class RemoteExecutor(GuardedExecutor):
    """Hands ops out, under guard, no more at once than the orchestration may have sandboxes.

    Args:
        inner: its own `max_concurrent` goes first, if it has one.
    """

    def __init__(self, inner: StepDelegatingExecutor) -> None:
        super().__init__(inner)
        self._delegating = inner

    def execute(
        self, plan_context: PlanOrchestrationContext, execution_plan: ExecutionPlan
    ) -> Iterator[dg.DagsterEvent]:
        """See Dagster's `Executor.execute`."""
        if self._delegating._max_concurrent is None:
            job = plan_context.reconstructable_job.get_definition()
            config = ResolvedRunConfig.build(job, plan_context.dagster_run.run_config)
            ops = cast("dict[str, Any]", config.ops)
            self._delegating._max_concurrent = _width([op.config for op in ops.values()])
        yield from super().execute(plan_context, execution_plan)


def _width(configs: Sequence[Any]) -> int:
    default = int(OrchestrationConfig.model_fields["max_concurrent"].default)
    for config in configs:
        if isinstance(config, Mapping) and "orchestration" in config:
            fields = cast("Mapping[str, Any]", config["orchestration"])
            return int(fields.get("max_concurrent", default))
    return default
