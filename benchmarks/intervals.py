"""Means, 95 % intervals and tests of differences between a few seeds."""

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import scipy.stats

LEVEL = 0.95


class Difference(NamedTuple):
    """A difference of two means.

    Attributes:
      mean: Mean of the first group minus that of the second.
      half_width: Half the width of the 95 % interval.
      p: Two-sided p value of no difference.
    """

    mean: float
    half_width: float
    p: float


def welch(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Compare two means without assuming equal variances (Welch); None for a group of fewer than two values."""
    if min(len(first), len(second)) < 2:
        return None
    parts = [statistics.variance(values) / len(values) for values in (first, second)]
    error = math.sqrt(sum(parts))
    shares = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (first, second), strict=True))
    degrees = sum(parts) ** 2 / shares if shares else math.inf
    return _difference(statistics.fmean(first) - statistics.fmean(second), error, degrees)


def paired(first: Sequence[float], second: Sequence[float]) -> Difference | None:
    """Compare values pair by pair, each pair from one seed; None for fewer than two pairs."""
    differences = [a - b for a, b in zip(first, second, strict=True)]
    if len(differences) < 2:
        return None
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return _difference(statistics.fmean(differences), error, len(differences) - 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p values by Holm's method, which bounds the probability of any false finding among several tests."""
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def _difference(mean: float, error: float, degrees: float) -> Difference:
    ratio = abs(mean) / error if error else math.inf if mean else 0.0
    student = scipy.stats.t(degrees)
    return Difference(mean, float(student.ppf((1 + LEVEL) / 2)) * error, 2 * float(student.sf(ratio)))
