"""Which patches the judge compares with which, and what its opinions add up to.

Pure functions. A comparison is won only where both orders of the two patches had the same pick;
all else is a tie, so that a judge that always takes the first one decides nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sandbox_pipeline.records import Judging, Opinion

Pair = tuple[int, int]


@dataclass(frozen=True)
class Decided:
    """One comparison that came to its end.

    Attributes:
        one, other: the forks.
        winner: None for a tie.
        reason: why, or why it is none.
    """

    one: int
    other: int
    winner: int | None
    reason: str


@dataclass(frozen=True)
class Judgement:
    """What counts of the judge's opinions.

    Attributes:
        shares: points of a fork's patch as a share of those it could have: 1 for a win, ½ for a
            tie. Only of forks that stand for a change.
        reasons: winner and loser of a comparison to why.
    """

    shares: Mapping[int, float] = field(default_factory=dict[int, float])
    reasons: Mapping[Pair, str] = field(default_factory=dict[Pair, str])


def pairs_of(entrants: Sequence[int], most: int) -> list[Pair]:
    """Who meets whom, in at most `most` pairs.

    All meet all where that fits. Else each meets the same number of others, evenly spread over
    the order given; where not even two for each fit, only the first `most` entrants take part.
    """
    count = len(entrants)
    if count * (count - 1) // 2 <= most:
        return [(entrants[i], entrants[j]) for i in range(count) for j in range(i + 1, count)]
    if most < 3:
        return [(entrants[0], entrants[k]) for k in range(1, most + 1)]
    count = min(count, most)
    rounds, farthest = most // count, (count - 1) // 2
    distances = [1 + k * farthest // rounds for k in range(min(rounds, farthest))]
    return [(entrants[i], entrants[(i + d) % count]) for d in distances for i in range(count)]


def missing(judging: Judging) -> list[Pair]:
    """The questions without an answer yet, in the order in which the patches are shown."""
    answered = {(opinion.first, opinion.second) for opinion in judging.opinions}
    wanted = [order for one, other in judging.pairs for order in ((one, other), (other, one))]
    return [order for order in wanted if order not in answered]


def decided(judging: Judging) -> list[Decided]:
    """The comparisons of which both orders were answered."""
    found = {(opinion.first, opinion.second): opinion for opinion in judging.opinions}
    return [
        _decide(found[one, other], found[other, one])
        for one, other in judging.pairs
        if (one, other) in found and (other, one) in found
    ]


def judgement_of(judging: Judging | None) -> Judgement:
    """What counts; nothing where the judge did not come to its end."""
    if judging is None or not judging.ended or judging.setback:
        return Judgement()
    points: dict[int, list[float]] = {}
    reasons: dict[Pair, str] = {}
    for item in decided(judging):
        for fork_num, other in ((item.one, item.other), (item.other, item.one)):
            won = 0.5 if item.winner is None else float(item.winner == fork_num)
            points.setdefault(fork_num, []).append(won)
            if item.winner == fork_num:
                reasons[fork_num, other] = item.reason
    return Judgement({number: sum(won) / len(won) for number, won in points.items()}, reasons)


def _decide(there: Opinion, back: Opinion) -> Decided:
    one, other = there.first, there.second
    for opinion in (there, back):
        if not opinion.usable:
            return Decided(one, other, None, opinion.reason)
    if there.pick is not None and there.pick == back.pick:
        return Decided(one, other, there.pick, there.reason)
    if there.pick is None and back.pick is None:
        return Decided(one, other, None, there.reason)
    return Decided(one, other, None, "the answer changed with the order of the two")
