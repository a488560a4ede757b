"""What the ops share."""

import asyncio

import dagster as dg

from sandbox_pipeline.defs.guard import instance_home
from sandbox_pipeline.runtime import Runtime

RUNTIME = "pipeline_runtime"
"""The key under which the ops and assets find it."""


@dg.resource(description="State store, sandbox providers and agents of this process.")
def pipeline_runtime(context: dg.InitResourceContext):  # noqa: ANN201 - a generator that Dagster drives
    """One `Runtime` for the steps of this process."""
    instance = context.instance
    runtime = Runtime.open(home=instance_home(instance) if instance is not None else None)
    try:
        yield runtime
    finally:
        asyncio.run(runtime.close())
