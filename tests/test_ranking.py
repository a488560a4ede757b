"""The order of the forks, and whether the reasons are true."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox_pipeline.comparison import compared, wilson
from sandbox_pipeline.config import RankingConfig
from sandbox_pipeline.ranking import Candidate, Tier, digest_of, rank
from sandbox_pipeline.records import Outcome, Verdict

WEIGHTS = RankingConfig()


def candidate(fork_num: int, **changes: Any) -> Candidate:
    fields: dict[str, Any] = {
        "outcome": Outcome.SUCCESS,
        "message": "",
        "verdict": Verdict.VERIFIED,
        "verify_reason": "5 tests passed",
        "digest": f"d{fork_num}",
        "lines": 10,
        "tests_passed": 5,
        "cost_usd": 0.1,
        "seconds": 10.0,
        **changes,
    }
    return Candidate(fork_num=fork_num, **fields)


def test_what_is_known_of_a_patch_decides_before_any_measure() -> None:
    forks = [
        candidate(0, digest=None, lines=None, verdict=Verdict.UNVERIFIED),
        candidate(1, verdict=Verdict.REJECTED, lines=1, cost_usd=0.0),
        candidate(2, verdict=Verdict.ERROR, lines=1, cost_usd=0.0),
        candidate(3, verdict=Verdict.UNVERIFIED, lines=1, cost_usd=0.0),
        candidate(4, outcome=Outcome.TIMEOUT, lines=1000, cost_usd=9, seconds=9999),
    ]
    ranked = rank(forks, WEIGHTS, verifying=True)
    assert [place.fork_num for place in ranked.places] == [4, 3, 2, 1, 0]
    assert ranked.winner is not None
    assert "the agent ended as timeout" in ranked.winner.reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tests_passed": 4}, "behind fork 0: fewer tests passed (4 against 5)"),
        ({"lines": 30}, "behind fork 0: larger change (30 lines against 10 lines)"),
        ({"cost_usd": 0.3}, "behind fork 0: higher cost ($0.3000 against $0.1000)"),
        ({"seconds": 30.0}, "behind fork 0: slower (30 s against 10 s)"),
        ({"cost_usd": None}, "behind fork 0: cost unknown (against $0.1000)"),
        ({}, "behind fork 0 by its number only"),
    ],
)
def test_the_reason_names_the_measure_that_decided(changes: dict[str, Any], reason: str) -> None:
    forks = [candidate(0), candidate(1, **changes)]
    first, second = rank(forks, WEIGHTS, verifying=True).places
    assert (first.fork_num, second.fork_num) == (0, 1)
    assert second.reason.endswith(reason)


def test_weights_change_the_order() -> None:
    forks = [candidate(0, lines=5, seconds=100.0), candidate(1, lines=50, seconds=1.0)]
    assert rank(forks, WEIGHTS, verifying=True).places[0].fork_num == 0
    hurry = RankingConfig(size=0, time=10)
    assert rank(forks, hurry, verifying=True).places[0].fork_num == 1


def test_the_same_change_shares_a_place_and_says_so() -> None:
    forks = [candidate(0, digest="x"), candidate(1), candidate(2, digest="x", cost_usd=0.9)]
    places = rank(forks, WEIGHTS, verifying=True).places
    assert [(p.place, p.fork_num, p.same_as) for p in places] == [
        (1, 0, None),
        (1, 2, 0),
        (2, 1, None),
    ]
    assert places[1].reason.startswith("the same change as fork 0")


@pytest.mark.parametrize(
    ("verdict", "verifying", "wins", "headline"),
    [
        (Verdict.VERIFIED, True, True, "fork 0 wins: verified"),
        (Verdict.UNVERIFIED, False, True, "fork 0 wins: not verified"),
        (Verdict.UNVERIFIED, True, False, "no winner: no patch was verified"),
        (Verdict.REJECTED, True, False, "no winner: no patch was verified"),
        (Verdict.ERROR, True, False, "no winner: no patch was verified"),
    ],
)
def test_only_what_was_shown_to_be_right_wins(
    verdict: Verdict, verifying: bool, wins: bool, headline: str
) -> None:
    ranked = rank([candidate(0, verdict=verdict)], WEIGHTS, verifying=verifying)
    assert (ranked.winner is not None) is wins
    assert ranked.headline.startswith(headline)


def test_without_any_patch_nobody_wins() -> None:
    fields = {"digest": None, "verdict": Verdict.UNVERIFIED, "outcome": Outcome.FAILED}
    ranked = rank([candidate(0, message="crashed", **fields)], WEIGHTS, verifying=False)
    assert ranked.headline == "no winner: no fork left a patch"
    assert ranked.places[0].reason == "no patch; the agent ended as failed (crashed)"
    assert rank([], WEIGHTS, verifying=True).places == ()


def test_the_digest_is_of_the_change_not_of_its_writing() -> None:
    one = b"diff --git a/x b/x\nindex 1..2 100644\n--- a/x\n+++ b/x\n@@ -1 +1 @@ f\n-a\n+b  \n"
    two = b"diff --git a/x b/x\nindex 1..3 100644\n--- a/x\n+++ b/x\n@@ -9 +9 @@ g\n-a\n+b\n"
    other = two.replace(b"+b", b"+c")
    more = b"diff --git a/y b/y\n--- a/y\n+++ b/y\n@@ -1 +1 @@\n-a\n+b\n"
    assert digest_of(one) == digest_of(two) != digest_of(other)
    assert digest_of(one + more) == digest_of(more + two)
    assert digest_of(b"\n ") is None


measures = st.one_of(st.none(), st.integers(0, 10**9))


@given(
    st.lists(
        st.tuples(
            st.sampled_from(list(Verdict)),
            st.sampled_from([o for o in Outcome if o.is_terminal]),
            measures,
            measures,
            st.one_of(st.none(), st.floats(0, 1e9)),
            st.one_of(st.none(), st.floats(0, 1e9)),
            st.sampled_from(["a", "b", None]),
        ),
        max_size=12,
    )
)
def test_every_fork_has_one_place_and_tiers_never_mix(rows: list[tuple[Any, ...]]) -> None:
    forks = [
        candidate(
            number, verdict=verdict, outcome=outcome, tests_passed=tests, lines=lines,
            cost_usd=cost, seconds=seconds, digest=digest,
        )
        for number, (verdict, outcome, tests, lines, cost, seconds, digest) in enumerate(rows)
    ]  # fmt: skip
    ranked = rank(forks, WEIGHTS, verifying=True)
    assert sorted(place.fork_num for place in ranked.places) == list(range(len(forks)))
    tiers = [place.candidate.tier for place in ranked.places]
    assert tiers == sorted(tiers)
    assert all(0 <= place.score <= 1.0001 for place in ranked.places)
    assert all(place.reason for place in ranked.places)
    assert (ranked.winner is not None) == (Tier.VERIFIED in tiers)


def test_wilson_is_what_the_textbook_says() -> None:
    low, high = wilson(8, 10)
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == 1.0


def test_a_side_without_forks_is_compared_without_dividing_by_nothing() -> None:
    side = compared("nothing", [])
    assert (side.rate, side.cost_per_pass_usd, side.seconds_p50) == (0.0, None, None)
