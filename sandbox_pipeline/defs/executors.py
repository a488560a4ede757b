"""The executors by name; those that need an extra say so where it is missing."""

from __future__ import annotations

from importlib.util import find_spec

import dagster as dg

from sandbox_pipeline.defs.executor import sandbox_async_executor, sandbox_multiprocess_executor
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.settings import PREFIX, ExecutorName

LOST_STEP_RETRIES = 3
_NEEDS = {"celery": ("dagster_celery", "celery", "redis"), "k8s": ("dagster_k8s", "kubernetes")}


def executor_named(name: ExecutorName) -> dg.ExecutorDefinition:
    """The executor that `SANDBOX_PIPELINE_EXECUTOR` names.

    Raises:
        ConfigError: its extra is not installed.
    """
    check_extra(name)
    if name == "celery":
        from sandbox_pipeline.defs.celery_steps import sandbox_celery_executor

        return sandbox_celery_executor
    if name == "k8s":
        from sandbox_pipeline.defs.k8s_steps import sandbox_k8s_executor

        return sandbox_k8s_executor
    return sandbox_multiprocess_executor if name == "multiprocess" else sandbox_async_executor


def check_extra(name: ExecutorName) -> None:
    """Make sure that what an executor needs is installed; imports none of it.

    Raises:
        ConfigError: it is not; names the variable, the value and the command.
    """
    missing = [module for module in _NEEDS.get(name, ()) if find_spec(module) is None]
    if missing:
        msg = (
            f"{PREFIX}EXECUTOR: {name!r} needs {', '.join(missing)}, which is not installed; run: "
            f"pip install 'sandbox-pipeline[{name}]'"
        )
        raise ConfigError(msg)


def check_place(executor: str, provider: str, db_url: str) -> None:
    """Make sure that ops in pods of their own can reach sandboxes and store.

    Args:
        executor: by name.
        provider: of the sandboxes, `auto` resolved.
        db_url: of the store.

    Raises:
        ConfigError: they can't.
    """
    if executor != "k8s":
        return
    if provider == "local":
        msg = (
            "sandbox.provider: 'local' has its sandboxes in the pod of one op, which the next one "
            f"can't reach; with {PREFIX}EXECUTOR 'k8s' use 'e2b' (set E2B_API_KEY)"
        )
        raise ConfigError(msg)
    if db_url.startswith("sqlite"):
        msg = (
            f"{PREFIX}DB_URL: SQLite is a file of one machine; with {PREFIX}EXECUTOR 'k8s' set it "
            "to a PostgreSQL URL (postgresql+psycopg://…)"
        )
        raise ConfigError(msg)


def lost_step_policy(name: ExecutorName) -> dg.RetryPolicy | None:
    """What follows when the worker or pod of an op dies: the op goes elsewhere, and resumes.

    An op's own failures allow no retries, so that only what nobody foresaw is tried again. There
    is no delay, since an op that waits for its retry counts as none under way: forks that wait
    for its slot would take its place for ever.
    """
    if name not in _NEEDS:
        return None
    return dg.RetryPolicy(max_retries=LOST_STEP_RETRIES)
