"""What the exit codes mean."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sandbox_pipeline.records import Outcome

SUCCESS = 0
INTERNAL = 1
BAD_CONFIGURATION = 2
SOME_FAILED = 3
ALL_FAILED = 4
RUN_FAILED = 5
CANCELLED = 130

EXIT_CODES = {
    SUCCESS: "all forks succeeded",
    INTERNAL: "something unexpected",
    BAD_CONFIGURATION: "bad configuration or usage; nothing was created",
    SOME_FAILED: "some forks failed",
    ALL_FAILED: "all forks failed",
    RUN_FAILED: "the run itself failed",
    CANCELLED: "cancelled",
}


def of_outcomes(outcomes: Sequence[Outcome]) -> int:
    """The exit code of an orchestration that was completed."""
    from sandbox_pipeline.records import Outcome  # not for a help text, which it takes longest of

    succeeded = sum(outcome is Outcome.SUCCESS for outcome in outcomes)
    if Outcome.CANCELLED in outcomes:
        return CANCELLED
    if succeeded == len(outcomes):
        return SUCCESS
    return SOME_FAILED if succeeded else ALL_FAILED
