"""One named orchestration as Dagster definitions: its assets, its job, its schedule."""

import os
import re
from collections.abc import Mapping
from typing import Any

import dagster as dg

from sandbox_pipeline.config import OrchestrationConfig, parse_config
from sandbox_pipeline.defs.decision import checks_of, decision_assets
from sandbox_pipeline.defs.executors import executor_named, lost_step_policy
from sandbox_pipeline.defs.frames import FRAME, Frame
from sandbox_pipeline.defs.launchpad import launchpad_schema
from sandbox_pipeline.defs.ops import (
    check_completion,
    cleanup_sandbox,
    create_sandbox,
    health_check,
    orchestrate,
    record_metrics,
    run_agent,
    verify_patch,
)
from sandbox_pipeline.defs.presentation import GROUP, summary_metadata
from sandbox_pipeline.defs.resources import RUNTIME, pipeline_runtime
from sandbox_pipeline.defs.trends import trends_asset
from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.metrics import frame
from sandbox_pipeline.orchestrating import refuse_secrets
from sandbox_pipeline.settings import ExecutorName
from sandbox_pipeline.store import tables

NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")

# A crashed worker's run is started anew as a whole: the ops skip what the store has, while
# Dagster's re-execution from failure would drop forks (dagster-io/dagster#20925).
RETRY_TAGS = {"dagster/retry_strategy": "ALL_STEPS"}


def build_orchestration(
    *,
    name: str | None = None,
    config: OrchestrationConfig | Mapping[str, Any],
    cron: str | None = None,
    timezone: str = "UTC",
    executor: ExecutorName = "async",
    max_concurrent: int | None = None,
    retry_attempts: int | None = None,
    **changes: Any,
) -> dg.Definitions:
    """Assets, job and schedule of one named orchestration, to merge into a project.

    Args:
        name: `[a-z][a-z0-9_]*`; prefixes the asset keys and names the job. None gives the
            plain `fork_metrics` and `orchestration_summary`.
        config: what the launchpad is prefilled with and a schedule runs.
        cron: when to run; the schedule is off until it is turned on.
        timezone: of `cron`.
        executor: how the ops run.
        max_concurrent: changes `config.max_concurrent`.
        retry_attempts: changes `config.retry.attempts`.
        **changes: other top-level fields of the configuration to change.

    Returns:
        Definitions with assets `fork_metrics`, `orchestration_summary`, `ranking`, `winner` and
        `trends`, their checks, job `<name>_job` and, with `cron`, schedule `<name>_schedule`.

    Raises:
        ConfigError: the name, the configuration, the cron or the timezone is wrong.
    """
    label = name or "orchestration"
    if not NAME.fullmatch(label):
        msg = f"name: {name!r} must be 1 to 63 of a-z, 0-9 and '_', starting with a letter"
        raise ConfigError(msg)
    base = _plain(config)
    if max_concurrent is not None:
        base["max_concurrent"] = max_concurrent
    if retry_attempts is not None:
        base["retry"] = {**base.get("retry", {}), "attempts": retry_attempts}
    base |= changes
    parse_config(base, source=label)
    prefix = [name] if name else []
    assets = [*_assets(name, base), *decision_assets(prefix), trends_asset(prefix)]
    chosen = executor_named(executor)
    job = dg.define_asset_job(
        f"{label}_job",
        selection=dg.AssetSelection.assets(*assets),
        description=f"Run the orchestration '{label}': fork the prompt, run, compare, clean up.",
        executor_def=chosen,
        op_retry_policy=lost_step_policy(executor),
        tags=RETRY_TAGS,
    )
    return dg.Definitions(
        assets=assets,
        asset_checks=[checks_of(prefix)],
        jobs=[job],
        schedules=[_schedule(label, job, cron, timezone)] if cron is not None else [],
        resources={RUNTIME: pipeline_runtime},
        executor=chosen,
    )


def _assets(
    name: str | None, defaults: Mapping[str, Any]
) -> tuple[dg.AssetsDefinition, dg.AssetsDefinition]:
    prefix = [name] if name else []

    @dg.config_mapping(config_schema=launchpad_schema(defaults))
    def to_op_config(config: dict[str, Any]) -> dict[str, Any]:
        refuse_secrets(parse_config(config), os.environ)
        return {"orchestrate": {"config": {"orchestration": config}}}

    @dg.graph_asset(
        name="fork_metrics",
        key_prefix=prefix or None,
        group_name=GROUP,
        config=to_op_config,
        kinds={"python", "pandas"},
        description="One row a fork: how it ended, what it cost, how long each stage took, and "
        "where its patch and transcript are.",
    )
    def fork_metrics() -> Frame:
        def one_fork(fork: Any) -> Any:
            measured = record_metrics(run_agent(health_check(create_sandbox(fork))))
            return verify_patch(cleanup_sandbox(measured))

        return check_completion(orchestrate().map(one_fork).collect())

    @dg.asset(
        name="orchestration_summary",
        key_prefix=prefix or None,
        group_name=GROUP,
        ins={"fork_metrics": dg.AssetIn(key=[*prefix, "fork_metrics"], dagster_type=FRAME)},
        required_resource_keys={RUNTIME},
        kinds={"python", "pandas"},
        dagster_type=FRAME,
        description="One row an orchestration: counts, success rate, cost, durations, and how "
        "long sandboxes were paid for while no agent ran.",
    )
    async def orchestration_summary(
        context: dg.AssetExecutionContext, fork_metrics: Frame
    ) -> dg.Output[Frame]:
        workflow_id = str(fork_metrics["workflow_id"].iloc[0])
        runtime = getattr(context.resources, RUNTIME)
        rows = await runtime.store.rows(tables.orchestration_summary, workflow_id)
        return dg.Output(
            frame(tables.orchestration_summary, rows), metadata=summary_metadata(rows[0])
        )

    return fork_metrics, orchestration_summary


def _schedule(label: str, job: Any, cron: str, timezone: str) -> dg.ScheduleDefinition:
    try:
        return dg.ScheduleDefinition(
            name=f"{label}_schedule",
            job=job,
            cron_schedule=cron,
            execution_timezone=timezone,
            default_status=dg.DefaultScheduleStatus.STOPPED,
            description=f"Runs '{label}' at {cron} ({timezone}).",
        )
    except dg.DagsterInvalidDefinitionError as error:
        msg = f"{label}: cron or timezone: {' '.join(str(error).split())}"
        raise ConfigError(msg) from error


def _plain(config: OrchestrationConfig | Mapping[str, Any]) -> dict[str, Any]:
    if isinstance(config, OrchestrationConfig):
        return config.model_dump(exclude_unset=True)
    return dict(config)
