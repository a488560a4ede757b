"""Who meets whom, and what opinions add up to."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from sandbox_pipeline.config import RankingConfig
from sandbox_pipeline.ranking import rank
from sandbox_pipeline.records import Judging, Opinion
from sandbox_pipeline.tournament import Judgement, judgement_of, missing, pairs_of
from tests.test_ranking import candidate


@given(st.integers(0, 60), st.integers(1, 200))
def test_pairs_are_bounded_different_and_fair(count: int, most: int) -> None:
    entrants = [10 + n for n in range(count)]
    pairs = pairs_of(entrants, most)
    assert len(pairs) <= most
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert all(one != other for one, other in pairs)
    met = Counter(number for pair in pairs for number in pair)
    if count * (count - 1) // 2 <= most:
        assert len(pairs) == count * (count - 1) // 2, "all meet all"
    elif most >= 3:
        assert len(set(met.values())) == 1, "each meets as many others"
        assert set(met) == set(entrants[: max(3, most)]), "the first ones, where not all fit"


def opinions(*told: tuple[int, int, int | None]) -> tuple[Opinion, ...]:
    return tuple(Opinion(first=a, second=b, pick=pick, reason="r") for a, b, pick in told)


def test_points_are_shares_and_only_of_what_came_to_its_end() -> None:
    pairs = ((0, 1), (0, 2), (1, 2))
    told = opinions((0, 1, 1), (1, 0, 1), (0, 2, 0), (2, 0, 2), (1, 2, None), (2, 1, 1))
    made = Judging(model="m", entrants=(0, 1, 2), pairs=pairs, opinions=told, ended=True)
    found = judgement_of(made)
    assert found.shares == {0: 0.25, 1: 0.75, 2: 0.5}
    assert found.reasons == {(1, 0): "r"}
    assert missing(made) == []
    part = made.model_copy(update={"opinions": told[:3]})
    assert missing(part) == [(2, 0), (1, 2), (2, 1)]
    for unfinished in ({"ended": False}, {"setback": "it failed"}):
        assert judgement_of(made.model_copy(update=unfinished)) == Judgement()
    assert judgement_of(None) == Judgement()


def test_the_judge_weighs_more_than_size_and_less_than_nothing_known() -> None:
    forks = [candidate(0, lines=5), candidate(1, lines=50), candidate(2, lines=1, tests_passed=1)]
    judgement = Judgement({0: 0.0, 1: 1.0}, {(1, 0): "fork 1 is right"})
    ranked = rank(forks, RankingConfig(), verifying=True, judgement=judgement)
    assert [place.fork_num for place in ranked.places] == [1, 0, 2]
    assert "preferred by the judge: fork 1 is right" in ranked.places[0].reason
    light = RankingConfig(judge=0.1)
    ranked = rank(forks, light, verifying=True, judgement=judgement)
    assert [place.fork_num for place in ranked.places] == [0, 1, 2]


def test_where_the_judge_saw_only_one_of_two_that_is_the_reason() -> None:
    forks = [candidate(0), candidate(1), candidate(2)]
    judgement = Judgement({1: 0.75, 2: 0.25}, {})
    ranked = rank(forks, RankingConfig(), verifying=True, judgement=judgement)
    assert [place.fork_num for place in ranked.places] == [1, 2, 0]
    reasons = [place.reason for place in ranked.places]
    assert "preferred by the judge (75% against 25% of its points)" in reasons[0]
    assert reasons[2].endswith("behind fork 2 because the judge compared only fork 2 with others")
