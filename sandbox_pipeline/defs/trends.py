"""The asset whose metadata Dagster plots over time, apart for each model and repository.

Dagster 1.13 draws one plot for each numeric metadata entry of an asset, over its materializations.
Its plots of a partitioned asset have one point a partition, the latest, and assets that no code
defines have no plots; so model and repository are in the entries' names.
"""

import dagster as dg

from sandbox_pipeline.comparison import Compared, compared, repo_name
from sandbox_pipeline.defs.frames import FRAME, Frame
from sandbox_pipeline.defs.presentation import GROUP, Metadata, cell
from sandbox_pipeline.defs.resources import RUNTIME
from sandbox_pipeline.metrics import frame
from sandbox_pipeline.records import Fork, Orchestration, orchestration_key
from sandbox_pipeline.results import history
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.store import tables

MAX_TABLE_ROWS = 100


def trends_asset(prefix: list[str]) -> dg.AssetsDefinition:
    """`trends`."""

    @dg.asset(
        name="trends",
        key_prefix=prefix or None,
        group_name=GROUP,
        ins={
            "orchestration_summary": dg.AssetIn(
                key=[*prefix, "orchestration_summary"], dagster_type=FRAME
            )
        },
        required_resource_keys={RUNTIME},
        kinds={"python", "pandas"},
        dagster_type=FRAME,
        description="One row a model and repository, over the latest orchestrations of this "
        "store: how often forks passed, what a pass cost, how long agents took. The plots of its "
        "metadata show the same for each orchestration, over time.",
    )
    async def trends(
        context: dg.AssetExecutionContext, orchestration_summary: Frame
    ) -> dg.Output[Frame]:
        runtime: Runtime = getattr(context.resources, RUNTIME)
        workflow_id = str(orchestration_summary["workflow_id"].iloc[0])
        mine = await runtime.store.need(Orchestration, orchestration_key(workflow_id))
        sides: dict[tuple[str, str], list[tuple[Orchestration, list[Fork]]]] = {}
        for orchestration, forks in await history(runtime):
            config = orchestration.config
            sides.setdefault((config.model, repo_name(config)), []).append((orchestration, forks))
        rows = [
            {
                "model": model,
                "repository": repository,
                "orchestrations": len(parts),
                **row_of(compared(model, parts)),
            }
            for (model, repository), parts in sorted(sides.items())
        ]
        forks = await runtime.store.forks(workflow_id)
        return dg.Output(
            frame(tables.trends, rows),
            metadata={
                **trend_metadata(mine, forks),
                "history": dg.MetadataValue.table(
                    [
                        dg.TableRecord({name: cell(value) for name, value in row.items()})
                        for row in rows[:MAX_TABLE_ROWS]
                    ]
                ),
            },
        )

    return trends


def row_of(side: Compared) -> dict[str, object]:
    """The columns of `trends` that are figures."""
    return {
        "forks": side.forks,
        "passed": side.passed,
        "verified": side.by_verification,
        "pass_rate": side.rate,
        "pass_rate_low": side.low,
        "pass_rate_high": side.high,
        "cost_per_pass_usd": side.cost_per_pass_usd,
        "agent_seconds_p50": side.seconds_p50,
    }


def trend_metadata(orchestration: Orchestration, forks: list[Fork]) -> Metadata:
    """Figures of one orchestration, named for its model and repository; unknown ones left out."""
    config = orchestration.config
    side = compared("", [(orchestration, forks)])
    passed = "verified" if side.by_verification else "success"
    figures = {
        f"{passed}_rate": side.rate,
        f"cost_per_{passed}_usd": side.cost_per_pass_usd,
        "agent_seconds_p50": side.seconds_p50,
    }
    return {
        f"{name}: {config.model} on {repo_name(config)}": dg.MetadataValue.float(value)
        for name, value in figures.items()
        if value is not None
    }
