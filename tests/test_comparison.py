"""Intervals and paired tests, against scipy, textbook numbers and their coverage."""

import itertools

import numpy as np
import pytest
from scipy import stats

from ftn_jax.comparison import compare, comparison_table, holm, interval, paired
from ftn_jax.results import Row


def row(method, task, seed, value):
    return Row(method, task, seed, "accuracy", value, 1, 2, 3, 4.0, {}, {}, "x", "", "")


def test_t_interval_is_scipys():
    x = [71.2, 73.9, 72.4]
    found = interval(x, level=0.9)
    low, high = stats.t.interval(0.9, 2, np.mean(x), stats.sem(x))
    assert (found.low, found.high) == pytest.approx((low, high))
    assert (found.mean, found.std, found.n) == (
        pytest.approx(72.5),
        pytest.approx(np.std(x, ddof=1)),
        3,
    )


@pytest.mark.parametrize("by", ["t", "bootstrap"])
def test_intervals_hold_the_mean_as_often_as_they_say(by):
    rng = np.random.default_rng(0)
    hits, runs = 0, 400
    for seed in range(runs):
        found = interval(
            rng.normal(3, 1, 20), level=0.8, by=by, resamples=400, seed=seed
        )
        hits += found.low < 3 < found.high
    assert 0.73 < hits / runs < 0.86  # 0.8, three standard errors of 0.02


def test_one_value_has_no_interval():
    found = interval([0.5])
    assert found.mean == 0.5 and np.isnan([found.std, found.low, found.high]).all()


def test_paired_tests_are_exact():
    """Against all signs that the differences could have had."""
    a, b = [0.8, 0.7, 0.9, 0.65, 0.5, 0.91], [0.7, 0.72, 0.75, 0.6, 0.42, 0.9]
    found = paired(a, b)
    gaps = np.subtract(a, b)
    ranks = stats.rankdata(np.abs(gaps))
    seen = ranks[gaps < 0].sum()
    at_least = [
        min(ranks[np.array(s) < 0].sum(), ranks[np.array(s) > 0].sum()) <= seen
        for s in itertools.product([-1, 1], repeat=len(gaps))
    ]
    assert found.wilcoxon == pytest.approx(np.mean(at_least))
    assert found.t_test == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert (found.wins, found.ties) == (5, 0)
    turned = paired(b, a)
    assert turned.difference.mean == -found.difference.mean
    assert turned.wilcoxon == found.wilcoxon


def test_level_methods_do_not_differ():
    found = paired([0.5, 0.7], [0.5, 0.1 + 0.6])
    assert (found.ties, found.t_test, found.wilcoxon) == (2, 1.0, 1.0)
    assert paired([0.5, 0.75], [0.25, 0.5]).t_test == 0.0


def test_holm_by_hand():
    p = {"a": 0.04, "b": 0.01, "c": 0.03}
    assert holm(p) == pytest.approx({"a": 0.06, "b": 0.03, "c": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_methods_are_compared_where_both_were_run():
    rows = [
        row("new", "cats", 0, 0.9),
        row("new", "cats", 1, 0.7),  # the old one was not run with seed 1
        row("new", "dogs", 0, 0.6),
        row("new", "birds", 0, 0.4),  # nor on birds
        row("old", "dogs", 0, 0.5),
        row("old", "cats", 0, 0.7),
        row("alone", "cats", 0, 0.1),
    ]
    found = compare(rows, "old")
    assert {*found} == {"new"}
    assert found["new"].difference.mean == pytest.approx(0.15)
    assert found["new"].difference.n == 2
    table = comparison_table(rows, "old")
    assert "| new | +15.0 |" in table and "2 / 0 / 0" in table


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: interval([]), "one or more finite numbers"),
        (lambda: interval([1.0, np.nan]), "one or more finite numbers"),
        (lambda: interval([1.0, 2.0], level=95), "between 0 and 1, found 95"),
        (lambda: paired([1.0], [2.0]), "two tasks or more"),
        (lambda: paired([1.0, 2.0], [2.0]), "found 2 and 1"),
        (lambda: compare([row("a", "t", 0, 1.0)], "b"), "no row of 'b'.*'a'"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
