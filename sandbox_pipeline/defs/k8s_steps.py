"""Ops as Kubernetes Jobs: dagster-k8s, under guard."""

from __future__ import annotations

from typing import Any, cast

import dagster as dg
from dagster._core.definitions.executor_definition import multiple_process_executor_requirements
from dagster_k8s import k8s_job_executor

from sandbox_pipeline.defs.remote import RemoteExecutor


@dg.executor(
    name="sandbox_k8s",
    config_schema=cast("Any", k8s_job_executor.config_schema),
    requirements=multiple_process_executor_requirements(),
)
def sandbox_k8s_executor(init_context: dg.InitExecutorContext) -> RemoteExecutor:
    """A Kubernetes Job for every op."""
    create = cast("Any", k8s_job_executor.executor_creation_fn)
    return RemoteExecutor(create(init_context))
