"""The assets that people decide with, and the checks of what they rest on."""

import asyncio
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterExecutionInterruptedError

from sandbox_pipeline.charts import cost_svg, data_url, timeline_svg
from sandbox_pipeline.config import OrchestrationConfig
from sandbox_pipeline.defs.frames import FRAME, Frame
from sandbox_pipeline.defs.interrupts import interruptible
from sandbox_pipeline.defs.presentation import GROUP, Metadata
from sandbox_pipeline.defs.resources import RUNTIME
from sandbox_pipeline.errors import PipelineError
from sandbox_pipeline.metrics import frame, judge_cost_usd
from sandbox_pipeline.publishing import publish
from sandbox_pipeline.ranking import Ranking
from sandbox_pipeline.records import Event, Fork, Lease, Orchestration, orchestration_key
from sandbox_pipeline.report import REPORT_FILE
from sandbox_pipeline.results import fork_of, place_row, ranking_of, read_patch
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.store import tables
from sandbox_pipeline.tournament import decided

MAX_DIFF_CHARS = 50_000
MAX_RANKED_ROWS = 200
CHECKS = {
    "every_planned_fork_present": "One row for each planned fork, whatever happened to it.",
    "success_rate": "At least the share of successful forks that was asked for; at least one fork.",
    "no_sandbox_leaked": "No sandbox of this orchestration is alive or in doubt.",
    "verification_untampered": "No patch touched files that are protected from it.",
}

COST_CHECK = "cost_within_budget"
COST_TEXT = "The known costs stay within budget_usd and, a fork, within agent.max_budget_usd."


def decision_assets(prefix: list[str]) -> tuple[dg.AssetsDefinition, dg.AssetsDefinition]:
    """`ranking` and `winner`."""

    @dg.asset(
        name="ranking",
        key_prefix=prefix or None,
        group_name=GROUP,
        ins={"fork_metrics": dg.AssetIn(key=[*prefix, "fork_metrics"], dagster_type=FRAME)},
        required_resource_keys={RUNTIME},
        kinds={"python", "pandas"},
        dagster_type=FRAME,
        description="One row a fork, the best patch first, with the reason for each place.",
    )
    async def ranking(context: dg.AssetExecutionContext, fork_metrics: Frame) -> dg.Output[Frame]:
        orchestration, forks, ranked = await _read(context, fork_metrics)
        rows = [place_row(orchestration.workflow_id, it, ranked.winner) for it in ranked.places]
        return dg.Output(
            frame(tables.ranking, rows), metadata=ranking_metadata(orchestration, forks, ranked)
        )

    @dg.asset(
        name="winner",
        key_prefix=prefix or None,
        group_name=GROUP,
        ins={"ranking": dg.AssetIn(key=[*prefix, "ranking"], dagster_type=FRAME)},
        required_resource_keys={RUNTIME},
        kinds={"python", "pandas"},
        dagster_type=FRAME,
        description="The patch to take, and why; no row where none can be recommended.",
    )
    async def winner(context: dg.AssetExecutionContext, ranking: Frame) -> dg.Output[Frame]:
        orchestration, forks, ranked = await _read(context, ranking)
        published = await _publish(context, orchestration, forks, ranked)
        rows: list[dict[str, Any]] = []
        if ranked.winner is not None:
            fork = fork_of(forks, ranked.winner.fork_num)
            rows.append(
                {
                    **place_row(orchestration.workflow_id, ranked.winner, ranked.winner),
                    "patch_path": fork.patch and fork.patch.path,
                }
            )
        return dg.Output(
            frame(tables.winner, rows),
            metadata={
                **winner_metadata(orchestration, forks, ranked),
                **publish_metadata(published),
            },
        )

    return ranking, winner


def checks_of(prefix: list[str]) -> dg.AssetChecksDefinition:
    """Of `fork_metrics` and `orchestration_summary`; none of them stops a run."""
    forks_key = dg.AssetKey([*prefix, "fork_metrics"])
    summary_key = dg.AssetKey([*prefix, "orchestration_summary"])
    specs = [
        dg.AssetCheckSpec(name, asset=forks_key, description=text) for name, text in CHECKS.items()
    ]
    specs.append(dg.AssetCheckSpec(COST_CHECK, asset=summary_key, description=COST_TEXT))

    @dg.multi_asset_check(
        name="_".join([*prefix, "decision_checks"]),
        specs=specs,
        required_resource_keys={RUNTIME},
        ins={"fork_metrics": dg.AssetIn(key=forks_key)},
    )
    async def decision_checks(  # noqa: ANN202 - Dagster takes only a tuple for several results
        context: dg.AssetCheckExecutionContext, fork_metrics: Frame
    ):
        orchestration, forks, _ = await _read(context, fork_metrics)
        leases = await _runtime(context).store.leases(orchestration.workflow_id)
        for result in fork_results(orchestration.config, forks, leases, fork_metrics):
            yield result._replace(asset_key=forks_key)
        cost = cost_result(
            orchestration.config, fork_metrics, judge_cost_usd=judge_cost_usd(orchestration)
        )
        yield cost._replace(asset_key=summary_key)

    return decision_checks


def fork_results(
    config: OrchestrationConfig,
    forks: list[Fork],
    leases: list[Lease],
    table: Frame,
) -> Iterator[dg.AssetCheckResult]:
    """The results of `CHECKS`."""
    numbers = sorted(int(number) for number in table["fork_num"])
    yield dg.AssetCheckResult(
        check_name="every_planned_fork_present",
        passed=numbers == list(range(config.num_forks)),
        metadata={"planned": config.num_forks, "rows": len(numbers)},
    )
    rate = float((table["outcome"] == "success").mean())
    least = config.fail_run_below_success_rate
    yield dg.AssetCheckResult(
        check_name="success_rate",
        passed=rate >= least if least is not None else rate > 0,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"success_rate": rate, "asked_for": least if least is not None else "above 0"},
    )
    yield dg.AssetCheckResult(
        check_name="no_sandbox_leaked",
        passed=not leases,
        metadata={"alive": len(leases), "leases": ", ".join(it.lease_id for it in leases[:20])},
    )
    touched = {
        fork.fork_num: fork.verification.restored
        for fork in forks
        if fork.verification and fork.verification.restored
    }
    yield dg.AssetCheckResult(
        check_name="verification_untampered",
        passed=not touched,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={
            "forks": len(touched),
            "put_back": "; ".join(
                f"fork {number}: {', '.join(names[:5])}" for number, names in touched.items()
            )[:2000],
        },
    )


def cost_result(
    config: OrchestrationConfig, table: Frame, *, judge_cost_usd: float | None = None
) -> dg.AssetCheckResult:
    """Of `cost_within_budget`; unknown costs are said, not taken for nothing."""
    known = table["cost_usd"].dropna().astype(float)
    total = float(known.sum()) + (judge_cost_usd or 0.0)
    over: list[str] = []
    if config.budget_usd is not None and total > config.budget_usd:
        over.append(f"${total:.4f} in all is over budget_usd {config.budget_usd:g}")
    each = config.agent.max_budget_usd
    if each is not None and bool((known > each).any()):
        over.append(f"{int((known > each).sum())} forks are over agent.max_budget_usd {each:g}")
    return dg.AssetCheckResult(
        check_name=COST_CHECK,
        passed=not over,
        severity=dg.AssetCheckSeverity.WARN,
        description="; ".join(over) or None,
        metadata={
            **({"cost_usd": total} if len(known) or judge_cost_usd is not None else {}),
            **({} if judge_cost_usd is None else {"judge_cost_usd": judge_cost_usd}),
            "forks_without_cost": int(table["cost_usd"].isna().sum()),
        },
    )


def ranking_metadata(orchestration: Orchestration, forks: list[Fork], ranked: Ranking) -> Metadata:
    """The order as a table, the charts as images, and the report."""
    records = [
        dg.TableRecord(
            {
                "place": place.place,
                "fork": place.fork_num,
                "verification": place.candidate.verdict.value,
                "outcome": place.candidate.outcome.value,
                "reason": place.reason,
            }
        )
        for place in ranked.places[:MAX_RANKED_ROWS]
    ]
    return {
        "decision": dg.MetadataValue.text(ranked.headline),
        "ranking": dg.MetadataValue.table(records),
        "timeline": dg.MetadataValue.md(_image("phases", timeline_svg(orchestration, forks))),
        "cost and verification": dg.MetadataValue.md(_image("cost", cost_svg(forks))),
        **_judge(orchestration, ranked),
        **_report(orchestration),
    }


def _judge(orchestration: Orchestration, ranked: Ranking) -> Metadata:
    judging = orchestration.judging
    if judging is None:
        return {}
    records = [
        dg.TableRecord(
            {
                "fork": item.one,
                "other": item.other,
                "better": "tie" if item.winner is None else str(item.winner),
                "reason": item.reason,
            }
        )
        for item in decided(judging)
    ]
    cost = judging.usage.cost_usd
    return {
        "judge": dg.MetadataValue.text(ranked.judge),
        **({"judge's comparisons": dg.MetadataValue.table(records)} if records else {}),
        **({} if cost is None else {"judge_cost_usd": dg.MetadataValue.float(cost)}),
    }


def winner_metadata(orchestration: Orchestration, forks: list[Fork], ranked: Ranking) -> Metadata:
    """Why, and the diff itself."""
    metadata: Metadata = {
        "decision": dg.MetadataValue.text(ranked.headline),
        **_report(orchestration),
    }
    if ranked.winner is not None:
        patch = read_patch(fork_of(forks, ranked.winner.fork_num)).decode("utf-8", "replace")
        metadata["fork"] = dg.MetadataValue.int(ranked.winner.fork_num)
        metadata["diff"] = dg.MetadataValue.md(fenced(patch[:MAX_DIFF_CHARS]))
    return metadata


def publish_metadata(published: list[Fork]) -> Metadata:
    """Where the patches went."""
    metadata: Metadata = {}
    for fork in published:
        if fork.published is not None:
            name = f"published fork {fork.fork_num}"
            url = fork.published.url
            metadata[name] = (
                dg.MetadataValue.url(url)
                if url is not None
                else dg.MetadataValue.text(f"{fork.published.branch} {fork.published.commit}")
            )
    return metadata


def fenced(text: str) -> str:
    """The text as a code block of markdown, which it can't leave."""
    longest = run = 0
    for char in text:
        run = run + 1 if char == "`" else 0
        longest = max(longest, run)
    fence = "`" * max(3, longest + 1)
    return f"{fence}diff\n{text}\n{fence}"


def _image(name: str, svg: str) -> str:
    return f"![{name}]({data_url(svg)})"


def _report(orchestration: Orchestration) -> Mapping[str, dg.MetadataValue]:
    path = Path(orchestration.artifacts) / REPORT_FILE
    return {"report": dg.MetadataValue.path(path)} if path.exists() else {}


def _runtime(context: Any) -> Runtime:
    return getattr(context.resources, RUNTIME)


async def _publish(
    context: dg.AssetExecutionContext,
    orchestration: Orchestration,
    forks: list[Fork],
    ranked: Ranking,
) -> list[Fork]:
    def announce(event: Event) -> None:
        context.log.info("%s fork=%s %s", event.name, event.fork_num, event.payload)

    run_id = context.run.run_id
    try:
        with interruptible():
            return await publish(
                _runtime(context), orchestration, forks, ranked, run_id=run_id, announce=announce
            )
    except asyncio.CancelledError:
        raise DagsterExecutionInterruptedError from None
    except PipelineError as error:
        text = _runtime(context).redactor(orchestration).text(str(error))
        raise dg.Failure(text, allow_retries=False) from error


async def _read(context: Any, table: Frame) -> tuple[Orchestration, list[Fork], Ranking]:
    store = _runtime(context).store
    workflow_id = str(table["workflow_id"].iloc[0])
    orchestration = await store.need(Orchestration, orchestration_key(workflow_id))
    forks = await store.forks(workflow_id)
    return orchestration, forks, ranking_of(orchestration, forks)
