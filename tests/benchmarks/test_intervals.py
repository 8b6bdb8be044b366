"""Intervals and tests beside SciPy's, and beside values worked out by hand."""

import math

import numpy as np
import pytest
import scipy.stats

from benchmarks import intervals

A, B = [72.3, 71.4, 71.5, 70.9], [68.1, 69.1, 68.9, 66.0]


def test_the_interval_of_a_mean_is_students():
    assert intervals.half_width([1.0, 3.0]) == pytest.approx(12.706204736)  # one degree of freedom, error of the mean 1
    low, high = scipy.stats.t.interval(0.95, 3, np.mean(A), scipy.stats.sem(A))
    assert intervals.half_width(A) == pytest.approx((high - low) / 2)
    assert intervals.half_width([1.0]) == math.inf


@pytest.mark.parametrize(
    ("ours", "theirs", "is_paired"),
    [
        (intervals.welch, lambda a, b: scipy.stats.ttest_ind(a, b, equal_var=False), False),
        (intervals.paired, scipy.stats.ttest_rel, True),
    ],
)
def test_differences_are_scipys(ours, theirs, is_paired):
    found, expected = ours(A, B), theirs(A, B)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(A) - np.mean(B))
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.p == pytest.approx(expected.pvalue)
    assert found.paired is is_paired
    assert ours(B, A).mean == pytest.approx(-found.mean)


def test_welch_takes_groups_of_different_sizes():
    expected = scipy.stats.ttest_ind(A, B[:2], equal_var=False)
    assert intervals.welch(A, B[:2]).p == pytest.approx(expected.pvalue)


def test_one_seed_has_no_interval_and_equal_values_have_none_to_tell():
    assert intervals.welch([1.0], B) is None
    assert intervals.paired([1.0], [2.0]) is None
    assert intervals.paired([2.0, 2.0], [2.0, 2.0]).p == 1.0
    assert intervals.paired([3.0, 3.0], [2.0, 2.0]).p == 0.0


def test_holm_is_the_worked_example():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1, never below the one before.
    assert intervals.holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert intervals.holm([0.5, 0.9]) == [1.0, 1.0]
    assert intervals.holm([]) == []
