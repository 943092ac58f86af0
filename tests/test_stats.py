"""Metrics on values worked by hand, against brute force, and with missing scores."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lib import stats

nan = np.nan
pools = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@settings(max_examples=50, deadline=None)
@given(pools, st.data())
def test_expectations_equal_brute_force_over_all_subsets(pool, data):
    k = data.draw(st.integers(1, len(pool)))
    subsets = list(itertools.combinations(pool, k))
    maximum = stats.per_prompt_maximum([pool], k)[0]
    probability = stats.per_prompt_probability([pool], k)[0]
    assert maximum == pytest.approx(np.mean([max(s) for s in subsets]), abs=1e-9)
    assert probability == pytest.approx(np.mean([max(s) >= 0.5 for s in subsets]), abs=1e-9)


def test_toxicity_by_hand():
    scores = [[0.1, 0.9, 0.5], [0.2, 0.3, 0.4]]
    np.testing.assert_allclose(stats.per_prompt_maximum(scores, 3), [0.9, 0.4])
    np.testing.assert_allclose(stats.per_prompt_maximum(scores, 1), [0.5, 0.3])
    np.testing.assert_allclose(
        stats.per_prompt_maximum(scores, 2), [(0.9 + 0.5 + 0.9) / 3, (0.3 + 0.4 + 0.4) / 3]
    )
    np.testing.assert_allclose(stats.per_prompt_probability(scores, 1), [2 / 3, 0])
    np.testing.assert_allclose(stats.per_prompt_probability(scores, 2), [1, 0])
    np.testing.assert_allclose(stats.per_prompt_fraction(scores), [2 / 3, 0])


def test_a_pool_of_25_is_stable():
    scores = np.tile(np.linspace(0, 1, 25), (3, 1))
    np.testing.assert_allclose(stats.per_prompt_maximum(scores, 25), 1.0)
    assert np.all(np.diff([stats.per_prompt_maximum(scores, k)[0] for k in range(1, 26)]) > 0)


def test_missing_scores_are_dropped_or_bounded_never_ignored():
    scores = [[0.6, nan], [nan, nan], [0.2, 0.4]]
    np.testing.assert_allclose(stats.per_prompt_fraction(scores), [1, nan, 0])
    np.testing.assert_allclose(stats.per_prompt_fraction(scores, missing="low"), [0.5, 0, 0])
    np.testing.assert_allclose(stats.per_prompt_fraction(scores, missing="high"), [1, 1, 0])
    np.testing.assert_allclose(stats.per_prompt_maximum(scores, 2), [nan, nan, 0.4])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[0.1, 0.2]], 3), "k is 3 for a pool of 2"),
        (([[0.1, 0.2]], 0), "k is 0"),
        (([0.1, 0.2], 1), r"shape \(2,\)"),
        (([[0.1]], 1, "zero"), "missing is 'zero'; allowed: drop, low, high"),
    ],
)
def test_bad_input_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        stats.per_prompt_maximum(*arguments)


def test_bootstrap_of_few_values():
    assert stats.bootstrap([])[3] == 0 and np.isnan(stats.bootstrap([]).value)
    one = stats.bootstrap([0.5, nan])
    assert one.value == 0.5 and np.isnan(one.low) and one.n == 1
    same = stats.bootstrap([0.5] * 10)
    assert (same.value, same.low, same.high, same.n) == (0.5, 0.5, 0.5, 10)


def test_bootstrap_interval_is_near_the_normal_one_and_covers():
    rng = np.random.default_rng(0)
    values = rng.normal(size=400)
    found = stats.bootstrap(values, seed=1)
    half = 1.96 * values.std(ddof=1) / 20
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)
    draws = rng.exponential(size=(200, 60))
    covered = [(lambda f: f.low <= 1 <= f.high)(stats.bootstrap(d, resamples=300)) for d in draws]
    assert 0.86 <= np.mean(covered) <= 0.99


def test_clusters_widen_the_interval():
    prompts = np.repeat(np.arange(30), 10)
    values = np.random.default_rng(0).normal(size=30)[prompts]  # all samples of a prompt alike
    loose, honest = stats.bootstrap(values), stats.bootstrap(values, clusters=prompts)
    assert honest.n == 30 and loose.n == 300
    assert honest.high - honest.low > 2.5 * (loose.high - loose.low)


def test_paired_bootstrap_of_two_columns():
    a = np.random.default_rng(0).normal(size=100)
    found = stats.bootstrap((a, 2 * a), stats.correlation)
    assert found.value == pytest.approx(1) and found.low == pytest.approx(1)
    assert np.isnan(stats.correlation(a, np.ones(100)))


@pytest.mark.parametrize("value, n", [(0.1, 3), (0.7, 6), (-1.3, 10), (1e9 + 0.1, 7), (0.0, 4)])
def test_equal_values_have_no_spread(value, n):
    """Their deviation is computed as rounding dust, such as 1.4e-17 for 0.1 three times."""
    equal = np.full(n, value)
    assert stats.spread(equal) == stats.spread(equal, ddof=1) == 0
    assert np.isnan(stats.correlation(equal, np.arange(n)))
    difference = stats.paired_difference(equal, equal + 0.6)
    assert np.isnan(difference.d) and difference.value == pytest.approx(0.6)
    from_a_model = (np.float32(value) * (1 + 1e-7 * (np.arange(n) % 2))).astype(np.float32)
    assert stats.spread(from_a_model, precision=np.float32) == 0


def test_small_spreads_are_no_rounding():
    times = 1.7e9 + np.arange(5.0)
    assert stats.spread(times) == np.std(np.arange(5.0))
    assert stats.spread(1e-12 * np.arange(5.0)) == pytest.approx(1e-12 * 2**0.5)
    assert np.isnan(stats.spread([1.0], ddof=1)) and np.isnan(stats.spread([1.0, np.nan]))


def test_the_sign_flip_test_does_not_depend_on_the_unit():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=12), rng.normal(size=12) + 0.4
    small, large = stats.paired_difference(a, b), stats.paired_difference(1e9 * a, 1e9 * b)
    assert small.p == large.p and small.d == pytest.approx(large.d)


def test_paired_difference_by_hand():
    a, b = np.array([1.0, 2, 3, 4]), np.array([2.0, 3, 4, 5])
    found = stats.paired_difference(a, b)
    assert found.value == found.low == found.high == 1.0
    assert found.d == pytest.approx(1 / np.sqrt(5 / 3))
    assert found.p == pytest.approx(2 / 16, abs=0.03)  # all signs equal: 2 of 2^4
    assert stats.paired_difference([1, nan, 2], [1, 5, nan]).n == 1


def test_sign_flip_p_is_large_under_no_effect_and_small_under_one():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=200)
    assert stats.paired_difference(noise, noise + 0.5 * rng.normal(size=200)).p > 0.05
    assert stats.paired_difference(noise, noise + 0.3).p < 0.01


def test_an_infinite_difference_has_no_p():
    found = stats.paired_difference([0.0, 0.0, 0.0], [np.inf, 1.0, 2.0], resamples=20)
    assert found.value == np.inf and np.isnan(found.p) and np.isnan(found.d)


def test_proportion_is_wilson():
    found = stats.proportion(8, 10)
    assert (round(found.low, 3), round(found.high, 3)) == (0.490, 0.943)
    assert np.isnan(stats.proportion(0, 0).value)
    with pytest.raises(ValueError, match="11 successes of 10"):
        stats.proportion(11, 10)


def test_t_interval_covers_the_mean_of_a_few_seeds_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(1.0, 2.0, (2000, 3))
    found = [stats.t_interval(row) for row in draws]
    assert abs(np.mean([x.low < 1 < x.high for x in found]) - 0.95) < 0.02
    assert found[0].n == 3 and abs(found[0].value - draws[0].mean()) < 1e-12
    assert np.isnan(stats.t_interval([1.0]).low) and np.isnan(stats.t_interval([]).value)


@pytest.mark.parametrize(
    ("low", "high", "better", "verdict"),
    [
        (-2, -1, "lower", "same direction"),
        (1, 2, "lower", "opposite"),
        (1, 2, "higher", "same direction"),
        (-1, 1, "lower", "not demonstrated"),
        (-1, 0, "lower", "not demonstrated"),
        (nan, nan, "lower", "not demonstrated"),
    ],
)
def test_decide(low, high, better, verdict):
    assert stats.decide(stats.Interval(0, low, high, 5), better=better) == verdict


@pytest.mark.parametrize(
    ("by_seed", "verdict"),
    [
        ([0.1, 0.2, 0.3], "same direction"),
        ([0.1, 0.2], "not demonstrated"),
        ([0.1, 0.2, -0.01], "not demonstrated"),
        ([0.1, 0.2, 0.0], "not demonstrated"),
    ],
)
def test_decide_looks_at_each_seed(by_seed, verdict):
    found = stats.Interval(0.2, 0.1, 0.3, 9)
    assert stats.decide(found, better="higher", by_seed=by_seed) == verdict
    below = stats.Interval(-0.2, -0.3, -0.1, 9)
    signs = [-value for value in by_seed]
    assert stats.decide(below, better="lower", by_seed=signs) == verdict


def test_combine_needs_agreement():
    assert stats.combine(["opposite", "opposite"]) == "opposite"
    assert stats.combine(["opposite", "same direction"]) == "not demonstrated"
    assert stats.combine([]) == "not demonstrated"
