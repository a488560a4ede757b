"""What an orchestration left, read for people: patches and their ranking."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sandbox_pipeline.errors import ConfigError
from sandbox_pipeline.ranking import Place, Ranking, candidate_of, digest_of, rank
from sandbox_pipeline.records import Fork, Orchestration

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
    return rank(candidates, config.ranking, verifying=config.verify_command is not None)


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
