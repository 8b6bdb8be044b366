"""Intervals and tests beside SciPy's, and beside values worked out by hand."""

import numpy as np
import pytest
import scipy.stats

from benchmarks import intervals

A, B = [72.3, 71.4, 71.5, 70.9], [68.1, 69.1, 68.9, 66.0]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (intervals.welch, lambda a, b: scipy.stats.ttest_ind(a, b, equal_var=False)),
        (intervals.paired, scipy.stats.ttest_rel),
    ],
)
def test_differences_are_scipys(ours, theirs):
    found, expected = ours(A, B), theirs(A, B)
    low, high = expected.confidence_interval(0.95)
    assert found.mean == pytest.approx(np.mean(A) - np.mean(B))
    assert found.half_width == pytest.approx((high - low) / 2)
    assert found.p == pytest.approx(expected.pvalue)
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
