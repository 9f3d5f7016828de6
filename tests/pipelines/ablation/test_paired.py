"""Differences of several seeds, with scipy and worked examples as oracles."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pipelines.ablation.paired import LEVEL, Spread, difference, holm, judge

NUMBERS = st.lists(
    st.tuples(st.integers(-1000, 1000), st.integers(-1000, 1000)), min_size=2, max_size=8
)


def test_a_spread_is_mean_and_standard_deviation():
    assert Spread.of([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5), 3)
    assert math.isnan(Spread.of([5.0]).deviation)


@given(NUMBERS)
def test_a_difference_is_scipys_paired_t_test(pairs):
    ours, theirs = (np.array(values, float) for values in zip(*pairs, strict=True))
    found = difference(ours.tolist(), theirs.tolist())
    apart = ours - theirs
    assert found.mean == pytest.approx(apart.mean())
    assert found.number == len(pairs)
    if apart.std() == 0:
        assert found.p == 1 if apart[0] == 0 else math.isnan(found.p)
        return
    oracle = stats.ttest_rel(ours, theirs)
    assert found.p == pytest.approx(oracle.pvalue, rel=1e-9)
    interval = oracle.confidence_interval(LEVEL)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)


def test_the_interval_of_three_seeds_by_hand():
    """Differences 1, 2, 3: mean 2, deviation 1, t_2(0.975) = 4.302653."""
    found = difference([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    half = 4.302653 / 3**0.5
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=1e-5)


def test_pairing_takes_out_what_both_have_of_a_seed():
    """Seeds lie 100 apart, cells 1 to 1.2: paired that is plain, unpaired it is nothing."""
    base, cell = [0.0, 100.0, 200.0], [1.0, 101.1, 201.2]
    assert difference(cell, base).p < 0.01
    assert stats.ttest_ind(cell, base).pvalue > 0.9


def test_seeds_that_all_say_the_same():
    assert difference([1.0, 2.0], [1.0, 2.0]).p == 1
    # Counts of few pictures may do that; how likely it is by chance they do not say, to the last digit neither.
    assert math.isnan(difference([2.0, 3.0], [1.0, 2.0]).p)
    counts = [8 / 60, 9 / 60, 8 / 60], [2 / 60, 3 / 60, 2 / 60]
    assert math.isnan(difference(*counts).p)
    assert judge({"cell": counts}, "higher")["cell"].verdict == "no spread"


def test_one_seed_has_a_difference_and_nothing_else():
    found = difference([3.0], [1.0])
    assert found.mean == 2
    assert all(map(math.isnan, (found.low, found.high, found.p)))


@pytest.mark.parametrize("pair", [([], []), ([1.0], []), ([1.0, 2.0], [1.0])])
def test_numbers_that_are_no_pairs_are_refused(pair):
    with pytest.raises(ValueError, match="are no pairs"):
        difference(*pair)


def test_holms_own_way():
    """0.01, 0.04, 0.03 of three: 3 x 0.01; 2 x 0.03; and 0.04, which may not come below 0.06."""
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


def test_what_is_not_known_is_no_comparison():
    adjusted = holm([0.02, math.nan, 0.5])
    assert adjusted[0] == pytest.approx(0.04)
    assert math.isnan(adjusted[1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=10))
def test_the_correction_lies_between_none_and_bonferronis_and_keeps_the_order(ps):
    adjusted = holm(ps)
    for p, raised in zip(ps, adjusted, strict=True):
        assert p <= raised <= min(1, len(ps) * p) + 1e-12 or raised == pytest.approx(p)
    by_p = sorted(zip(ps, adjusted, strict=True))
    assert [raised for _, raised in by_p] == sorted(adjusted)


def test_without_a_difference_a_family_of_comparisons_rarely_finds_one():
    """The correction is there for this: at most 5 % of families, where uncorrected it would be a third."""
    rng = np.random.default_rng(0)
    corrected = plain = 0
    for _ in range(1500):
        # Each with a baseline of its own, so that comparisons are independent.
        numbers = rng.normal(size=(8, 2, 4)).tolist()
        pairs = {str(k): (ours, theirs) for k, (ours, theirs) in enumerate(numbers)}
        judged = judge(pairs, "lower")
        corrected += any(one.verdict != "no difference seen" for one in judged.values())
        plain += any(one.difference.p <= 1 - LEVEL for one in judged.values())
    assert plain / 1500 == pytest.approx(1 - 0.95**8, abs=0.05)
    assert corrected / 1500 < 0.07


@pytest.mark.parametrize(
    ("direction", "values", "verdict"),
    [
        ("lower", [1.0, 1.1, 1.05], "better"),
        ("higher", [1.0, 1.1, 1.05], "worse"),
        ("lower", [9.0, 9.1, 9.05], "worse"),
        ("higher", [9.0, 9.1, 9.05], "better"),
        ("lower", [5.5, 4.4, 5.2], "no difference seen"),
        ("none", [1.0, 1.1, 1.05], "not judged"),
    ],
)
def test_a_verdict_follows_from_interval_and_direction(direction, values, verdict):
    judged = judge({"cell": (values, [5.0, 5.1, 5.0])}, direction)["cell"]
    assert judged.verdict == verdict
    inside = judged.difference.low <= 0 <= judged.difference.high
    assert inside == (verdict == "no difference seen")


def test_one_run_has_no_verdict():
    assert judge({"cell": ([1.0], [5.0])}, "lower")["cell"].verdict == "no spread"


def test_many_cells_make_a_small_difference_uncertain():
    base = [5.0, 5.1, 4.9]
    cell = [4.0, 4.5, 4.2]
    alone = judge({"cell": (cell, base)}, "lower")["cell"]
    others = {str(k): ([5.1, 4.9, 5.0], base) for k in range(9)}
    among = judge({"cell": (cell, base), **others}, "lower")["cell"]
    assert alone.verdict == "better"
    assert among.verdict == "no difference seen"
    assert among.difference == alone.difference
