"""What an orchestration left, read for people: patches and their ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.ranking import Place, Ranking, candidate_of, digest_of, rank
from sandbox_pipeline.records import Fork, Judging, Orchestration
from sandbox_pipeline.runtime import Runtime
from sandbox_pipeline.tournament import decided, judgement_of

MAX_HISTORY = 200
MAX_RANKED_PATCH_BYTES = 100_000_000


def read_patch(fork: Fork) -> bytes:
    """The fork's patch; empty where there is none on this machine."""
    if fork.patch is None or fork.patch.path is None:
        return b""
    try:
        with Path(fork.patch.path).open("rb") as file:
            return file.read(MAX_RANKED_PATCH_BYTES)
    except OSError:
        return b""


def ranking_of(orchestration: Orchestration, forks: Sequence[Fork]) -> Ranking:
    """The order of the forks; reads their patches."""
    candidates = [candidate_of(fork, digest_of(read_patch(fork))) for fork in forks]
    config = orchestration.config
    ranked = rank(
        candidates,
        config.ranking,
        verifying=config.verify_command is not None,
        judgement=judgement_of(orchestration.judging),
    )
    return replace(ranked, judge=judging_text(orchestration.judging))


def judging_text(judging: Judging | None) -> str:
    """What the judge did, in one line; empty where there is none."""
    if judging is None:
        return ""
    who = f"the judge ({judging.model})"
    cost = judging.usage.cost_usd
    paid = ""
    if judging.opinions or judging.sums:
        paid = "; its cost is unknown" if cost is None else f"; it cost ${cost:.4f}"
    if judging.setback:
        return f"ranked without {who}: {judging.setback}{paid}"
    if not judging.ended:
        asked = 2 * len(judging.pairs)
        return f"{who} was not done: {len(judging.opinions)} of {asked} answers{paid}"
    found = decided(judging)
    won = sum(item.winner is not None for item in found)
    unusable = sum(not opinion.usable for opinion in judging.opinions)
    parts = [f"{who} compared {len(judging.entrants)} patches in {len(found)} pairs, each in both "
             f"orders: {won} decided, {len(found) - won} ties"]  # fmt: skip
    if unusable:
        parts.append(f"{unusable} answers were unusable and count as ties")
    if judging.partial:
        numbers = ", ".join(map(str, judging.partial))
        parts.append(f"it saw only a part of the patch of fork {numbers}")
    return "; ".join(parts) + paid


def judging_document(judging: Judging | None) -> dict[str, Any] | None:
    """What `--json` says of the judge."""
    if judging is None:
        return None
    return {
        "model": judging.model,
        "entrants": list(judging.entrants),
        "comparisons": [vars(item) for item in decided(judging)],
        "planned": len(judging.pairs),
        "unusable_answers": sum(not opinion.usable for opinion in judging.opinions),
        "partial": list(judging.partial),
        "setback": judging.setback or None,
        **judging.usage.model_dump(),
    }


async def history(
    runtime: Runtime, limit: int = MAX_HISTORY
) -> list[tuple[Orchestration, list[Fork]]]:
    """The latest orchestrations that are over, newest first, with their forks."""
    found = await runtime.store.orchestrations(limit=10 * limit)
    latest = [it for it in found if it.complete][:limit]
    return [(it, await runtime.store.forks(it.workflow_id)) for it in latest]


def place_row(workflow_id: str, place: Place, winner: Place | None) -> dict[str, Any]:
    """A place as a row of the asset `ranking`."""
    item = place.candidate
    return {
        "workflow_id": workflow_id,
        "place": place.place,
        "fork_num": place.fork_num,
        "winner": winner is not None and place.fork_num == winner.fork_num,
        "verification": item.verdict.value,
        "outcome": item.outcome.value,
        "tests_passed": item.tests_passed,
        "lines_changed": item.lines,
        "cost_usd": item.cost_usd,
        "agent_seconds": item.seconds,
        "judge_share": place.judge_share,
        "score": place.score,
        "same_as": place.same_as,
        "reason": place.reason,
    }


def fork_of(forks: Sequence[Fork], fork_num: int) -> Fork:
    """One of the forks.

    Raises:
        ConfigError: there is no such number.
    """
    for fork in forks:
        if fork.fork_num == fork_num:
            return fork
    msg = f"fork: {fork_num} is not one of 0 to {len(forks) - 1}"
    raise ConfigError(msg)
