"""Ops on Celery workers: tasks of dagster-celery, watched.

dagster-celery's own executor waits for ever for a task whose worker was killed, and can't be
cancelled before its running tasks end. Here a task that its worker no longer knows of counts as
lost, so that the op is given to another worker, where it takes up what the store has.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import dagster as dg
from celery import Celery
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster._core.events import EngineEventData
from dagster._core.execution.retries import RetryMode, get_retries_config
from dagster._core.executor.step_delegating import (
    CheckStepHealthResult,
    StepDelegatingExecutor,
    StepHandler,
    StepHandlerContext,
)
from dagster._serdes import pack_value
from dagster_celery import make_app, tasks
from dagster_celery.config import DEFAULT_CONFIG, TASK_EXECUTE_PLAN_NAME
from dagster_celery.tags import DAGSTER_CELERY_QUEUE_TAG
from kombu.exceptions import OperationalError

from sandbox_pipeline.defs.remote import RemoteExecutor
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.settings import PREFIX, Settings

if TYPE_CHECKING:
    from dagster._core.execution.plan.step import ExecutionStep

ANSWER_SECONDS = 2.0
DOUBTS = 2
"""So many looks in a row at a task that nobody works on make it a lost one."""
RESULT_SECONDS = 3600
TASKS_PER_PROCESS = 200


def celery_app(environ: dict[str, str]) -> Celery:
    """The Celery app of workers and runs alike, with the task that executes an op.

    Raises:
        ConfigError: `SANDBOX_PIPELINE_CELERY_BROKER` is no URL of Redis.
    """
    broker = Settings.from_environ(environ).celery_broker
    settings = {
        **DEFAULT_CONFIG,
        # Which worker has a task is how a lost one is told from one that takes long.
        "task_track_started": True,
        # A task that waits in a worker behind an hour of agent could run elsewhere.
        "worker_disable_prefetch": True,
        "worker_max_tasks_per_child": TASKS_PER_PROCESS,
        "result_expires": RESULT_SECONDS,
        "broker_connection_retry_on_startup": True,
    }
    app = cast("Any", make_app).make_app(
        {"broker": broker, "backend": broker, "config_source": settings}
    )
    cast("Any", tasks).create_task(app)
    return app


class CeleryStepHandler(StepHandler):
    """Sends an op to the workers, asks how it is, ends it.

    Args:
        app: as `celery_app` makes it.
    """

    def __init__(self, app: Celery) -> None:
        super().__init__()
        # Celery has no types.
        self._app = cast("Any", app)
        self._sent: dict[str, Any] = {}
        self._doubts: Counter[str] = Counter()

    @property
    def name(self) -> str:
        """See Dagster's `StepHandler.name`."""
        return "celery"

    def launch_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Put the op into its queue."""
        context = step_handler_context
        step = _step(context)
        queue = step.tags.get(DAGSTER_CELERY_QUEUE_TAG) or self._app.conf.task_default_queue
        job = cast("Any", context._plan_context).reconstructable_job
        task = self._app.tasks[TASK_EXECUTE_PLAN_NAME]
        result = task.apply_async(
            kwargs={
                "execute_step_args_packed": pack_value(context.execute_step_args),
                "executable_dict": job.to_dict(),
            },
            queue=queue,
            routing_key=f"{queue}.{TASK_EXECUTE_PLAN_NAME}",
        )
        self._sent[step.key] = result
        self._doubts[step.key] = 0
        yield dg.DagsterEvent.engine_event(
            context.get_step_context(step.key),
            f"Celery task {result.id} in queue {queue!r}.",
            EngineEventData(),
        )

    def check_step_health(self, step_handler_context: StepHandlerContext) -> CheckStepHealthResult:
        """Whether somebody works on the op, or it waits for a worker."""
        key = _step(step_handler_context).key
        doubt = self._doubt(self._sent[key])
        if doubt is None:
            self._doubts[key] = 0
            return CheckStepHealthResult.healthy()
        # Its last events may be on their way.
        self._doubts[key] += 1
        if self._doubts[key] < DOUBTS:
            return CheckStepHealthResult.healthy()
        return CheckStepHealthResult.unhealthy(doubt)

    def terminate_step(self, step_handler_context: StepHandlerContext) -> Iterator[dg.DagsterEvent]:
        """Take the op from its worker or its queue; what it began is settled by the guard."""
        step = _step(step_handler_context)
        self._app.control.revoke(self._sent[step.key].id, terminate=True, signal="SIGTERM")
        yield dg.DagsterEvent.engine_event(
            step_handler_context.get_step_context(step.key), "Celery task revoked."
        )

    def _doubt(self, result: Any) -> str | None:
        state, info = result.state, result.info
        if state in ("PENDING", "RECEIVED"):
            return None
        if state != "STARTED":
            return f"its Celery task ended as {state} without a result: {str(info)[:300]}"
        worker = str(info["hostname"])
        inspect = self._app.control.inspect(destination=[worker], timeout=ANSWER_SECONDS)
        answer = cast("dict[str, dict[str, Any]] | None", inspect.query_task(result.id))
        if answer is None:
            return f"its Celery worker {worker} does not answer"
        if result.id not in answer.get(worker, {}):
            return f"its Celery worker {worker} does not know of it any more"
        return None


@dg.executor(
    name="sandbox_celery",
    config_schema={
        "retries": get_retries_config(),
        "max_concurrent": dg.Field(
            dg.IntSource,
            is_required=False,
            description="Most ops of one run that are under way at once; default: the "
            "orchestration's max_concurrent.",
        ),
        "check_seconds": dg.Field(
            dg.IntSource,
            default_value=5,
            description="How often to look whether the workers still have their ops.",
        ),
    },
    requirements=multiple_process_executor_requirements(),
)
def sandbox_celery_executor(init_context: dg.InitExecutorContext) -> RemoteExecutor:
    """Ops on Celery workers."""
    config = cast("dict[str, Any]", init_context.executor_config)
    app = celery_app(dict(os.environ))
    _check_broker(app)
    return RemoteExecutor(
        StepDelegatingExecutor(
            CeleryStepHandler(app),
            retries=RetryMode.from_config(config["retries"]) or RetryMode.ENABLED,
            max_concurrent=config.get("max_concurrent"),
            check_step_health_interval_seconds=config["check_seconds"],
        )
    )


def _check_broker(app: Celery) -> None:
    try:
        with cast("Any", app).connection_for_write() as connection:
            connection.ensure_connection(max_retries=1, timeout=10)
    except OperationalError as error:
        msg = f"{PREFIX}CELERY_BROKER: no answer: {error}; start Redis, or set its URL"
        raise ConfigError(msg) from None


def _step(context: StepHandlerContext) -> ExecutionStep:
    [step] = context._steps_by_key.values()
    return step
