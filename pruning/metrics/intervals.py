"""95 % intervals: how much a mean varies from one choice of samples to another. Loads without torch and scipy."""
from __future__ import annotations

import math
from typing import Optional, Tuple

import numpy as np

from pruning.metrics import Metric

LEVEL = 0.95
MIN_SAMPLES = 5  # fewer values say nothing about how skewed they are
WIDEST = 2.0  # times as far as Student's t, at most
POWER = 0.84 + 1.96  # standard errors between a mean and a limit at which 4 of 5 intervals do not reach the limit

Interval = Optional[Tuple[float, float]]


def metric_interval(metric: Metric, values, dense, seeds: int = 1) -> Interval:
    """Return the 95 % interval that a metric's entry asks for, within the metric's bounds; None if there is none.

    values, dense: (seeds * n,) of the images and of the dense model's images from the same noise, ordered seed by seed;
    None counts as NaN. Only an interval of the "difference" needs `dense`, and is relative to its mean.
    """
    own, base = by_sample(values, seeds), 0.0
    if metric.interval == "difference":
        others = by_sample(dense, seeds)
        own, base = own - others, others.mean()
    found = mean_interval(own) if metric.interval else None
    return found and tuple(float(np.clip(end, metric.bounds[0] - base, metric.bounds[1] - base)) for end in found)


def mean_interval(values) -> Interval:
    """Return the 95 % interval (low, high) of the mean of independent values (n,).

    Returns None for fewer than MIN_SAMPLES values, or if a value is not finite. If all values are equal, low and high
    are that value.
    """
    values = np.asarray(values, float)
    if len(values) < MIN_SAMPLES or not np.isfinite(values).all():
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = mean_ends(values)
    return (float(low), float(high)) if np.isfinite([low, high]).all() else None


def mean_ends(values: np.ndarray) -> Tuple[np.ndarray, np.ndarray]:
    """Return the ends (...) of the 95 % intervals of the means of values (..., n).

    Student's t is too narrow on the side of the longer tail. Hall's transformation removes the skewness of t (Hall,
    1992, "On the removal of skewness by transformation"). Here it only widens: each end lies at least as far from the
    mean as by Student's t, because few values may hide their tail, and at most WIDEST times as far, because one outlier
    would move it without bound. tests/test_intervals.py has a table of how often these intervals hold the true mean.
    """
    count, mean = values.shape[-1], values.mean(-1)
    centred = values - mean[..., None]
    variance = (centred ** 2).mean(-1)
    error = np.sqrt(variance / (count - 1))
    error = np.where(error <= 1e-12 * np.maximum(1.0, np.abs(mean)), 0.0, error)
    skewness = (centred ** 3).mean(-1) / np.where(error > 0, variance, 1.0) ** 1.5 / math.sqrt(count)
    t = t_critical(count - 1)
    below, above = (np.clip(_without_skewness(t, each), t, WIDEST * t) for each in (skewness, -skewness))
    return mean - below * error, mean + above * error


def _without_skewness(t: float, skewness: np.ndarray) -> np.ndarray:
    """Return what Hall's transformation maps to t. skewness: of the values, divided by the root of their number."""
    a = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)
    return 3 / a * (np.cbrt(1 + a * (t - a / 6)) - 1)


def median_interval(values) -> Interval:
    """Return the 95 % interval of the median of independent values (n,), whatever their distribution.

    The ends are values themselves (the sign test; Conover, 1999, section 3.2). None for fewer than 6 values.
    """
    ordered, count = sorted(values), len(values)
    chances = np.cumsum([math.comb(count, below) for below in range(count // 2)]) / 2 ** count
    left_out = np.searchsorted(chances, (1 - LEVEL) / 2, side="right")  # values at each end
    return (float(ordered[left_out - 1]), float(ordered[-left_out])) if left_out else None


def samples_needed(values, limit: float) -> float:
    """Return about how many values would tell their mean from a limit, inf if the mean is the limit.

    values: (n,), with a 95 % interval that reaches the limit; NaN if they have none. The mean and the spread are taken
    to stay, and the interval to shrink with the root of n, until the limit is as far as the interval reaches and POWER
    standard errors.
    """
    values = np.asarray(values, float)
    (low, high), mean = mean_interval(values) or (math.nan, math.nan), values.mean()
    reach = max(mean - low if mean > limit else high - mean, POWER * values.std(ddof=1) / math.sqrt(len(values)))
    return len(values) * (reach / (mean - limit)) ** 2 if mean != limit else math.inf


def t_critical(degrees: int) -> float:
    """Return the two-sided critical value of Student's t at LEVEL for these degrees of freedom (1 or more).

    An interval reaches this many standard errors to each side of the estimate.
    """
    from scipy.special import stdtrit  # importing scipy at the top would slow every --help down

    return float(stdtrit(degrees, (1 + LEVEL) / 2))


def by_sample(values, seeds: int = 1) -> np.ndarray:
    """Return the mean of each sample over its noise seeds, (n,), from the values of all images, (seeds * n,).

    The values are ordered seed by seed. Values of one sample depend on each other; the means of different samples do
    not. None counts as NaN. Raises ValueError if the number of values is not a multiple of `seeds`.
    """
    return np.array([math.nan if value is None else value for value in values], float).reshape(seeds, -1).mean(axis=0)
