"""Forks in order of how good their patches are, with the reason for each place in words.

Pure functions: the same forks give the same order. What is known of a patch decides first
(`Tier`); among equals the weighted measures do.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from sandbox_pipeline.config import RankingConfig
from sandbox_pipeline.records import Fork, Outcome, Verdict
from sandbox_pipeline.tournament import Judgement

MAX_REASON_CHARS = 500


class Tier(IntEnum):
    """What is known of a patch; the lower the better, and no measure makes up for it."""

    VERIFIED = 0
    UNVERIFIED = 1
    """The agent succeeded, and nothing was shown for or against its patch."""
    DOUBTFUL = 2
    """The verification itself failed, or the agent did not succeed and nobody checked."""
    REJECTED = 3
    NOTHING = 4
    """There is no patch."""


@dataclass(frozen=True)
class Candidate:
    """What the order depends on.

    Attributes:
        digest: equal for equal changes, see `digest_of`; None without a patch.
        lines: added and removed; None without a patch.
    """

    fork_num: int
    outcome: Outcome
    message: str
    verdict: Verdict
    verify_reason: str
    digest: str | None
    lines: int | None
    tests_passed: int | None
    cost_usd: float | None
    seconds: float | None

    @property
    def tier(self) -> Tier:
        """What is known of its patch."""
        if self.digest is None:
            return Tier.NOTHING
        if self.verdict is Verdict.VERIFIED:
            return Tier.VERIFIED
        if self.verdict is Verdict.REJECTED:
            return Tier.REJECTED
        if self.verdict is Verdict.ERROR or self.outcome is not Outcome.SUCCESS:
            return Tier.DOUBTFUL
        return Tier.UNVERIFIED


@dataclass(frozen=True)
class Place:
    """One fork's place.

    Attributes:
        place: from 1; the same for the same change.
        score: weighted measures, 0 to 1, comparable within a tier only.
        judge_share: of the points that the judge could give; None where it wasn't asked.
        same_as: the fork that stands for this change, where it is another one.
    """

    place: int
    candidate: Candidate
    score: float
    reason: str
    same_as: int | None = None
    judge_share: float | None = None

    @property
    def fork_num(self) -> int:
        """Which fork."""
        return self.candidate.fork_num


@dataclass(frozen=True)
class Ranking:
    """The order, and what follows from it.

    Attributes:
        winner: None where no patch can be recommended.
        headline: who won and why, or why nobody did.
        judge: what the judge did, in one line; empty where there is none.
    """

    places: tuple[Place, ...]
    winner: Place | None
    headline: str
    judge: str = ""


@dataclass(frozen=True)
class _Measure:
    name: str
    weight: float
    values: Mapping[int, float | None]
    smaller_is_better: bool
    worse: str
    better: str
    unit: str

    reasons: Mapping[tuple[int, int], str] | None = None
    """Of a judge: better and worse one to why; None for a measure that is counted."""

    def lead(self, fork_num: int, other: int) -> float:
        """How much it puts the first ahead of the other; below 0: behind."""
        judged = self.reasons is not None
        if judged and None in (self.values[fork_num], self.values[other]):
            return 0.0
        return self.weight * (self.score(fork_num) - self.score(other))

    def score(self, fork_num: int) -> float:
        """0 to 1: the best known value has 1, an unknown one 0."""
        value = self.values[fork_num]
        if value is None:
            return 0.0
        known = [item for item in self.values.values() if item is not None]
        if self.smaller_is_better:
            best = min(known)
            return 1.0 if value <= best else (best + 1e-9) / (value + 1e-9)
        best = max(known)
        return 1.0 if best == 0 else value / best

    def said(self, fork_num: int, other: int, *, ahead: bool) -> str:
        """Such as `larger change (24 lines against 6)`."""
        if self.reasons is not None:
            return self._judged(fork_num, other, ahead=ahead)
        if self.values[fork_num] is None or self.values[other] is None:
            return f"{self.name} {self._text(fork_num)} (against {self._text(other)})"
        pair = f"{self._text(fork_num)} against {self._text(other)}"
        return f"{self.better if ahead else self.worse} ({pair})"

    def _judged(self, fork_num: int, other: int, *, ahead: bool) -> str:
        best, worst = (fork_num, other) if ahead else (other, fork_num)
        why = (self.reasons or {}).get((best, worst))
        if why is not None:
            return f"{self.better if ahead else self.worse}: {why}"
        pair = f"{self.values[fork_num]:.0%} against {self.values[other]:.0%} of its points"
        return f"{self.better if ahead else self.worse} ({pair})"

    def _text(self, fork_num: int) -> str:
        value = self.values[fork_num]
        if value is None:
            return "unknown"
        if self.unit == "$":
            return f"${value:.4f}"
        number = f"{value:.0f}" if value == int(value) else f"{value:.2f}"
        return f"{number} {self.unit}".rstrip()


def candidate_of(fork: Fork, digest: str | None) -> Candidate:
    """What the order depends on, of a stored fork."""
    found, patch = fork.verification, fork.patch
    return Candidate(
        fork_num=fork.fork_num,
        outcome=fork.outcome,
        message=fork.message,
        verdict=found.outcome if found else Verdict.UNVERIFIED,
        verify_reason=found.reason if found else "",
        digest=digest,
        lines=patch.insertions + patch.deletions if patch and digest else None,
        tests_passed=found.tests_passed if found else None,
        cost_usd=fork.result.usage.cost_usd if fork.result else None,
        seconds=fork.timings.agent_seconds,
    )


def digest_of(patch: bytes) -> str | None:
    """A name of the change itself; None for an empty patch.

    Blob ids, line numbers, trailing blanks and the order of files don't count.
    """
    if not patch.strip():
        return None
    sections: list[list[bytes]] = []
    for raw in patch.splitlines():
        if raw.startswith(b"diff --git ") or not sections:
            sections.append([])
        if raw.startswith(b"index "):
            continue
        sections[-1].append(b"@@" if raw.startswith(b"@@ ") else raw.rstrip())
    joined = b"\0".join(sorted(b"\n".join(lines) for lines in sections))
    return hashlib.sha256(joined).hexdigest()


def rank(
    candidates: Sequence[Candidate],
    weights: RankingConfig,
    *,
    verifying: bool,
    judgement: Judgement | None = None,
) -> Ranking:
    """Put the forks in order.

    Args:
        candidates: one a fork.
        weights: of the measures.
        verifying: there was a `verify_command`; only a verified patch can win then.
        judgement: on some of the patches.
    """
    judged = _judged(candidates, judgement or Judgement())
    measures = _measures(candidates, weights, judged)
    total = sum(measure.weight for measure in measures) or 1.0
    scores = {
        item.fork_num: sum(measure.weight * measure.score(item.fork_num) for measure in measures)
        / total
        for item in candidates
    }
    groups: dict[str, list[Candidate]] = {}
    for item in sorted(candidates, key=lambda it: (it.tier, -scores[it.fork_num], it.fork_num)):
        key = f"{item.tier}:{item.digest}" if item.digest else f"alone:{item.fork_num}"
        groups.setdefault(key, []).append(item)
    ordered = list(groups.values())
    places: list[Place] = []
    for number, group in enumerate(ordered, start=1):
        first = group[0]
        above = ordered[number - 2][0] if number > 1 else None
        below = ordered[number][0] if number < len(ordered) else None
        reason = _reason(first, above, below, measures)
        share = judged.shares.get(first.fork_num)
        score = scores[first.fork_num]
        places.append(Place(number, first, score, reason, judge_share=share))
        for twin in group[1:]:
            reason = _short(f"the same change as fork {first.fork_num}; {_standing(twin)}")
            score = scores[twin.fork_num]
            share = judged.shares.get(twin.fork_num)
            places.append(Place(number, twin, score, reason, first.fork_num, share))
    best = places[0] if places else None
    allowed = (Tier.VERIFIED,) if verifying else (Tier.VERIFIED, Tier.UNVERIFIED)
    winner = best if best is not None and best.candidate.tier in allowed else None
    return Ranking(tuple(places), winner, _headline(winner, candidates, verifying=verifying))


def contenders(ranking: Ranking) -> list[int]:
    """The forks whose patches a judge can help with, the best by the other measures first.

    Those that could win and of which the same is known: verification, and tests passed. One of
    each different change.
    """
    if ranking.winner is None:
        return []
    tier = ranking.winner.candidate.tier
    first = [it for it in ranking.places if it.candidate.tier is tier and it.same_as is None]
    most = max(it.candidate.tests_passed or 0 for it in first)
    return [it.fork_num for it in first if (it.candidate.tests_passed or 0) == most]


def _judged(candidates: Sequence[Candidate], judgement: Judgement) -> Judgement:
    """The judgement also of the forks that made the same change as one that was judged."""
    by_number = {item.fork_num: item for item in candidates}
    stands_for = {
        item.fork_num: number
        for item in candidates
        for number in judgement.shares
        if (item.tier, item.digest) == (by_number[number].tier, by_number[number].digest)
    }
    shares = {number: judgement.shares[first] for number, first in stands_for.items()}
    reasons = {
        (winner, loser): why
        for winner, first in stands_for.items()
        for loser, second in stands_for.items()
        if (why := judgement.reasons.get((first, second))) is not None
    }
    return Judgement(shares, reasons)


def _measures(
    candidates: Sequence[Candidate], weights: RankingConfig, judged: Judgement
) -> list[_Measure]:
    def values(name: str) -> dict[int, float | None]:
        return {item.fork_num: getattr(item, name) for item in candidates}

    listed = [
        _Measure("tests", weights.tests, values("tests_passed"), False, "fewer tests passed",
                 "more tests passed", ""),
        _Measure("judge", weights.judge,
                 {item.fork_num: judged.shares.get(item.fork_num) for item in candidates}, False,
                 "the judge preferred that one", "preferred by the judge", "", judged.reasons),
        _Measure("size", weights.size, values("lines"), True, "larger change",
                 "smaller change", "lines"),
        _Measure("cost", weights.cost, values("cost_usd"), True, "higher cost", "lower cost", "$"),
        _Measure("time", weights.time, values("seconds"), True, "slower", "faster", "s"),
    ]  # fmt: skip
    # What is known of nobody tells nobody apart.
    return [
        measure
        for measure in listed
        if measure.weight > 0 and any(value is not None for value in measure.values.values())
    ]


def _reason(
    item: Candidate,
    above: Candidate | None,
    below: Candidate | None,
    measures: Sequence[_Measure],
) -> str:
    parts = [_standing(item)]
    if above is not None and above.tier is item.tier and item.tier is not Tier.NOTHING:
        parts.append(_compared(item, above, measures, ahead=False))
    elif above is None and below is not None and below.tier is item.tier < Tier.REJECTED:
        parts.append(_compared(item, below, measures, ahead=True))
    return _short("; ".join(parts))


def _standing(item: Candidate) -> str:
    """What is known of this patch, in words."""
    how = "" if item.outcome is Outcome.SUCCESS else f"; the agent ended as {item.outcome.value}"
    if how and item.message:
        how += f" ({item.message})"
    if item.tier is Tier.NOTHING:
        if item.outcome is Outcome.SUCCESS:
            return "no patch: the agent changed nothing"
        return f"no patch{how}"
    if item.verdict is Verdict.UNVERIFIED:
        why = f": {item.verify_reason}" if item.verify_reason else ""
        return f"not verified{why}{how}"
    words = {
        Verdict.VERIFIED: "verified",
        Verdict.REJECTED: "rejected",
        Verdict.ERROR: "the verification failed",
    }
    return f"{words[item.verdict]}: {item.verify_reason}{how}"


def _compared(
    item: Candidate, other: Candidate, measures: Sequence[_Measure], *, ahead: bool
) -> str:
    """The measure that weighs most in the order of these two."""
    sign = 1 if ahead else -1

    def lead(measure: _Measure) -> float:
        return sign * measure.lead(item.fork_num, other.fork_num)

    place = "ahead of" if ahead else "behind"
    most = max(measures, key=lead, default=None)
    if most is None or lead(most) <= 0:
        return f"{place} fork {other.fork_num} {_no_measure(item, other, measures)}"
    said = most.said(item.fork_num, other.fork_num, ahead=ahead)
    return f"{place} fork {other.fork_num}: {said}"


def _no_measure(item: Candidate, other: Candidate, measures: Sequence[_Measure]) -> str:
    """What decided where no measure that both have did."""
    for measure in measures:
        asked = [measure.values[it.fork_num] is not None for it in (item, other)]
        if measure.reasons is not None and asked[0] != asked[1]:
            which = other.fork_num if asked[1] else item.fork_num
            return f"because the judge compared only fork {which} with others"
    return "by its number only"


def _headline(winner: Place | None, candidates: Sequence[Candidate], *, verifying: bool) -> str:
    if winner is not None:
        return f"fork {winner.fork_num} wins: {winner.reason}"
    if not any(item.digest for item in candidates):
        return "no winner: no fork left a patch"
    if verifying:
        return "no winner: no patch was verified"
    return "no winner: no fork with a patch succeeded"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= MAX_REASON_CHARS else f"{text[: MAX_REASON_CHARS - 1]}…"
